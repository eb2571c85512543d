"""Hugging Face tensors put together from what trainer ranks hold, in one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from lockstep.models.checkpoint.load import flat_rows
from lockstep.models.checkpoint.shares import box, share_out
from lockstep.models.contract import Shard


def hf_tensors(
    ranks: Sequence[tuple[Sequence[Shard], Mapping[str, torch.Tensor]]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of the whole model from every rank's shards and parameters, shared out as for a sync.

    What no rank holds is NaN, so that nothing passes for whole that isn't.
    """
    tensors: dict[str, torch.Tensor] = {}
    for shares, (_, values) in zip(share_out([shards for shards, _ in ranks], shapes), ranks, strict=True):
        for share in shares:
            rows = flat_rows(values[share.shard.megatron], share.shard)
            for piece, place in share.pieces:
                assert piece.name is not None
                shape = shapes[piece.name]
                into = tensors.setdefault(piece.name, rows.new_full(shape, float("nan")))
                into[tuple(slice(*pair) for pair in box(piece, shape))] = rows[place : place + piece.rows]
    return tensors.items()
