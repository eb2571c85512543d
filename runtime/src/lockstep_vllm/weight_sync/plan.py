"""The senders' plan as the receiver sees it: buckets in the order they are received in, and where every weight's bytes are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Box = tuple[tuple[int, int], ...]
"""A half-open range for every dimension of a tensor."""


class PlanError(ValueError):
    """A plan that can't be followed; the message names the weight."""


@dataclass(frozen=True)
class Meta:
    """A weight as a checkpoint holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """A box of the weight `name`, contiguous at `offset` bytes of its bucket."""

    name: str
    meta: Meta
    box: Box
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in self.box)

    def view(self, bytes_N: torch.Tensor) -> torch.Tensor:
        nbytes = math.prod(self.shape) * self.meta.dtype.itemsize
        return bytes_N[self.offset : self.offset + nbytes].view(self.meta.dtype).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Number `index` of those that `sender` sends."""

    sender: int
    index: int
    nbytes: int
    slots: tuple[Slot, ...]

    @property
    def first(self) -> str:
        return self.slots[0].name


@dataclass(frozen=True)
class Plan:
    """buckets: in the one order in which every worker receives them, so that no two wait for each other. metas: of all weights."""

    id: str
    senders: int
    buckets: tuple[Bucket, ...]
    metas: Mapping[str, Meta]

    @property
    def nbytes(self) -> int:
        return sum(bucket.nbytes for bucket in self.buckets)

    @property
    def largest(self) -> int:
        return max((bucket.nbytes for bucket in self.buckets), default=0)


def parse(raw: Mapping[str, Any]) -> Plan:
    """Raises PlanError when the boxes of a weight don't make it whole."""
    senders = [[_bucket(s, i, one) for i, one in enumerate(sent)] for s, sent in enumerate(raw["senders"])]
    rounds = range(max((len(sent) for sent in senders), default=0))
    buckets = tuple(sent[i] for i in rounds for sent in senders if i < len(sent))
    metas = {slot.name: slot.meta for bucket in buckets for slot in bucket.slots}
    _check_whole(buckets, metas)
    return Plan(raw["id"], len(senders), buckets, metas)


def _bucket(sender: int, index: int, raw: Mapping[str, Any]) -> Bucket:
    return Bucket(sender, index, raw["nbytes"], tuple(_slot(slot) for slot in raw["slots"]))


def _slot(raw: Sequence[Any]) -> Slot:
    name, dtype, shape, offset, box = raw
    whole = tuple((0, size) for size in shape)
    return Slot(
        name, Meta(getattr(torch, dtype), tuple(shape)), whole if box is None else tuple((a, b) for a, b in box), offset
    )


def _check_whole(buckets: Sequence[Bucket], metas: Mapping[str, Meta]) -> None:
    held = dict.fromkeys(metas, 0)
    for slot in (slot for bucket in buckets for slot in bucket.slots):
        if slot.meta != metas[slot.name]:
            raise PlanError(f"weight {slot.name!r} comes in two shapes: {slot.meta} and {metas[slot.name]}")
        held[slot.name] += math.prod(slot.shape)
    for name, count in held.items():
        if count != math.prod(metas[name].shape):
            raise PlanError(
                f"weight {name!r} has {math.prod(metas[name].shape)} elements and the senders bring {count}: "
                "a sender is missing, or two bring the same part"
            )


def assemble(plan: Plan, buffers: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, whole: a view of its bucket where it came in one piece, else put together in memory of its own.

    buffers: one for each bucket of the plan. One weight at a time; order: of their first parts.
    """
    parts: dict[str, list[tuple[Slot, torch.Tensor]]] = {}
    for bucket, bytes_N in zip(plan.buckets, buffers, strict=True):
        for slot in bucket.slots:
            parts.setdefault(slot.name, []).append((slot, bytes_N))
    for name, held in parts.items():
        if len(held) == 1:
            yield name, held[0][0].view(held[0][1])
            continue
        meta = plan.metas[name]
        whole = torch.empty(meta.shape, dtype=meta.dtype, device=held[0][1].device)
        for slot, bytes_N in held:
            whole[tuple(slice(low, high) for low, high in slot.box)].copy_(slot.view(bytes_N))
        yield name, whole
