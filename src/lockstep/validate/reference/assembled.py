"""Hugging Face tensors put together from what trainer ranks hold, in one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lockstep.models.checkpoint.load import flat_rows
from lockstep.models.checkpoint.shares import Share, box, share_out
from lockstep.models.contract import Shard

Rank = tuple[Sequence[Shard], Mapping[str, Tensor]]
"""A rank's shards, and its parameters by Megatron's names."""


def hf_tensors(
    ranks: Sequence[Rank], shapes: Mapping[str, tuple[int, ...]], shares: Sequence[Sequence[Share]] | None = None
) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of the whole model from every rank's shards and parameters.

    shares: what each rank supplies; None: as for a sync.

    What no rank holds is NaN, so that nothing passes for complete that isn't.
    """
    if shares is None:
        shares = share_out([shards for shards, _ in ranks], shapes)
    tensors: dict[str, Tensor] = {}
    for supplied, (_, parameters) in zip(shares, ranks, strict=True):
        for share in supplied:
            rows = flat_rows(parameters[share.shard.megatron], share.shard)
            for piece, first in share.pieces:
                assert piece.name is not None
                shape = shapes[piece.name]
                into = tensors.setdefault(piece.name, rows.new_full(shape, float("nan")))
                into[tuple(slice(*pair) for pair in box(piece, shape))] = rows[first : first + piece.rows]
    return tensors.items()


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
