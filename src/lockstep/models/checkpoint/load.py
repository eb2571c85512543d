"""Reads a rank's Megatron shards from a Hugging Face checkpoint, by the contract's pieces.
`shares.py` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lockstep.models.checkpoint.read import Checkpoint
from lockstep.models.contract import Piece, Shard


def load_shards(
    checkpoint: Checkpoint,
    shards: Iterable[Shard],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Megatron name, tensor) of one rank, reading only the slices it holds.

    One shard is in memory at a time beside what the caller keeps. dtype None keeps the
    checkpoint's.
    """
    layer = ""
    for shard in shards:
        if shard.megatron.rsplit(".", 3)[0] != layer:
            checkpoint.release()  # lets go of the mapped pages, so that they don't add up over the model
            layer = shard.megatron.rsplit(".", 3)[0]
        yield shard.megatron, _load_one(checkpoint, shard, device, dtype)
    checkpoint.release()


def kept_dtype(checkpoint: Checkpoint, shard: Shard, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in a model that computes in `dtype`. A vector that a narrower
    checkpoint stores in fp32 keeps fp32.

    Released Qwen3.5 models store the vectors `A_log` and the gated norm's weight in fp32, beside
    matrices in bf16. The engine computes with vectors in fp32 anyway. It multiplies matrices in
    `dtype`, so it keeps them in `dtype`.
    """
    names = [piece.name for piece in shard.pieces if piece.name is not None]
    if dtype != torch.bfloat16 or len(shard.shape) != 1 or not names or not checkpoint.mixed:
        return dtype
    return torch.float32 if all(checkpoint.tensors[name].dtype == "F32" for name in names) else dtype


def _load_one(checkpoint: Checkpoint, shard: Shard, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    parts = {piece: checkpoint.read(piece) for piece in shard.pieces[:1] if piece.name is not None}
    kept = dtype or (next(iter(parts.values())).dtype if parts else _any_dtype(checkpoint, shard))
    parameter = torch.empty(shard.shape, dtype=kept, device=device)
    rows = flat_rows(parameter, shard)
    for piece, row in placed(shard):
        into = rows[row : row + piece.rows]
        if piece.name is None:
            into.zero_()
        else:
            into.copy_(parts[piece] if piece in parts else checkpoint.read(piece))
    return parameter


def _any_dtype(checkpoint: Checkpoint, shard: Shard) -> torch.dtype:
    """A shard of nothing but padding takes the embedding's dtype."""
    name = f"{checkpoint.layout.prefix}embed_tokens.weight"
    return checkpoint.read(Piece(name, 0, 1)).dtype


def flat_rows(tensor: Tensor, shard: Shard) -> Tensor:
    """The view in which a shard's pieces are stacked along dim 0: stacked experts lose their expert
    dimension.
    """
    return tensor.view(-1, tensor.shape[-1]) if shard.domain == "expert_tensor" else tensor


def placed(shard: Shard) -> Iterator[tuple[Piece, int]]:
    """Every piece with the row it starts at in `flat_rows`."""
    row = 0
    for piece in shard.pieces:
        yield piece, row
        row += piece.rows
