"""A trainer rank's share of the weights as sources of a plan: one for each parameter, or for some
experts of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lockstep.engine.weight_sync.plan import Part, Source
from lockstep.models.checkpoint.shares import Share, box
from lockstep_wire.plan import TensorMeta

MERGED_ELEMENTS = 1 << 26
"""A stack of experts is merged this many elements at a time, which bounds the fp32 copies."""


@dataclass(frozen=True)
class Supply:
    """The contents of one source: experts [first, last) of a stacked parameter, or (None) a full
    parameter.
    """

    name: str
    experts: tuple[int, int] | None


def share_sources(
    share: Share, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[Source, Supply]]:
    """A share as sources: one, or for a stack of experts one for every few of them.

    dtype: as the weights travel.
    """
    shard = share.shard
    parts = []
    for piece, row in share.pieces:
        assert piece.name is not None
        meta = TensorMeta(piece.name, dtype, shapes[piece.name])
        parts.append(Part(meta, box(piece, meta.shape), row, piece.rows))
    if shard.domain != "expert_tensor":
        width = math.prod(shard.shape[1:])
        yield Source(shard.megatron, dtype, shard.shape[0], width, tuple(parts)), Supply(shard.megatron, None)
        return
    experts, rows, width = shard.shape
    several = max(1, MERGED_ELEMENTS // (rows * width))
    for first in range(0, experts, several):
        last = min(experts, first + several)
        low, high = first * rows, last * rows
        within = tuple(Part(p.meta, p.box, p.row - low, p.rows) for p in parts if low <= p.row < high)
        key = f"{shard.megatron}[{first}:{last}]"
        yield Source(key, dtype, high - low, width, within), Supply(shard.megatron, (first, last))
