"""A sync's plan on the wire: which box of which weight lies where in which bucket of which sender.

The senders write it (`plan_json`), the receivers read it (`parse`). Which rows a sender copies into
a bucket is its own affair (`lockstep.engine.weight_sync.plan`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lockstep_wire.short_text import shortened

Box = tuple[tuple[int, int], ...]
"""A half-open range for every dimension of a tensor."""


_MOST = 1 << 48
"""Bytes of a bucket, and elements of a weight: more than any machine holds."""


class PlanError(ValueError):
    """A plan that can't be followed; the message names the weight."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


@dataclass(frozen=True)
class TensorMeta:
    """Name (of the Hugging Face checkpoint), dtype and full shape of one weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def full_box(self) -> Box:
        return tuple((0, size) for size in self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """A box of a weight, contiguous at `offset` bytes of its bucket."""

    meta: TensorMeta
    box: Box
    offset: int

    @property
    def name(self) -> str:
        return self.meta.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in self.box)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.meta.dtype.itemsize

    def view(self, bucket_N: torch.Tensor) -> torch.Tensor:
        """The box inside a bucket of bytes."""
        return bucket_N[self.offset : self.offset + self.nbytes].view(self.meta.dtype).view(self.shape)


@dataclass(frozen=True)
class WireBucket:
    """Number `index` of those that `sender` sends."""

    sender: int
    index: int
    nbytes: int
    slots: tuple[Slot, ...]

    @property
    def first(self) -> str:
        return self.slots[0].name


@dataclass(frozen=True)
class WirePlan:
    """buckets: in the one order in which every worker receives them, so that no two wait for each
        other.
    metas: of all weights.
    """

    id: str
    senders: int
    buckets: tuple[WireBucket, ...]
    metas: Mapping[str, TensorMeta]

    @property
    def nbytes(self) -> int:
        return sum(bucket.nbytes for bucket in self.buckets)

    @property
    def largest(self) -> int:
        return max((bucket.nbytes for bucket in self.buckets), default=0)


def plan_json(senders: Iterable[Iterable[tuple[int, Sequence[Slot]]]]) -> dict[str, Any]:
    """The message that `parse` reads, with an id that names this content.

    senders: for each sender its buckets in order, each as (bytes, slots).
    """
    described = [[_bucket_json(nbytes, slots) for nbytes, slots in buckets] for buckets in senders]
    text = json.dumps(described, separators=(",", ":"))
    return {"id": hashlib.sha256(text.encode()).hexdigest(), "senders": described}


def _bucket_json(nbytes: int, slots: Sequence[Slot]) -> dict[str, Any]:
    """A slot's box is null where the weight is whole."""
    described = []
    for slot in slots:
        box = None if slot.box == slot.meta.full_box else [list(pair) for pair in slot.box]
        dtype = str(slot.meta.dtype).removeprefix("torch.")
        described.append([slot.name, dtype, list(slot.meta.shape), slot.offset, box])
    return {"nbytes": nbytes, "slots": described}


def parse(raw: Mapping[str, Any]) -> WirePlan:
    """Raises PlanError for what is no plan, and when the boxes of a weight don't make it whole."""
    try:
        return _parsed(raw)
    except PlanError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"the plan is none: {type(error).__name__}: {str(error)[:200]}") from error


def _parsed(raw: Mapping[str, Any]) -> WirePlan:
    senders = [[_bucket(s, i, bucket) for i, bucket in enumerate(sent)] for s, sent in enumerate(raw["senders"])]
    rounds = range(max((len(sent) for sent in senders), default=0))
    buckets = tuple(sent[i] for i in rounds for sent in senders if i < len(sent))
    metas = {slot.name: slot.meta for bucket in buckets for slot in bucket.slots}
    _check_whole(buckets, metas)
    return WirePlan(raw["id"], len(senders), buckets, metas)


def _bucket(sender: int, index: int, raw: Mapping[str, Any]) -> WireBucket:
    bucket = WireBucket(sender, index, _count(raw["nbytes"]), tuple(_slot(slot) for slot in raw["slots"]))
    for slot in bucket.slots:
        if slot.offset % slot.meta.dtype.itemsize or slot.offset + slot.nbytes > bucket.nbytes:
            raise PlanError(f"{slot.name!r} lies at byte {slot.offset}, outside of its bucket of {bucket.nbytes} bytes")
    if not bucket.slots:
        raise PlanError(f"bucket {index} of sender {sender} is empty")
    return bucket


def _slot(raw: Sequence[Any]) -> Slot:
    name, dtype, shape, offset, box = raw
    kind = getattr(torch, dtype)
    if not isinstance(name, str) or not isinstance(kind, torch.dtype):
        raise PlanError(f"{name!r} of dtype {dtype!r} is no weight")
    meta = TensorMeta(name, kind, tuple(_count(size) for size in shape))
    cut = meta.full_box if box is None else tuple((_count(low), _count(high)) for low, high in box)
    if len(cut) != len(meta.shape) or any(
        low > high or high > size for (low, high), size in zip(cut, meta.shape, strict=True)
    ):
        raise PlanError(f"{name!r} of shape {meta.shape} has no part {cut}")
    return Slot(meta, cut, _count(offset))


def _count(value: Any) -> int:
    """A size or a place. Raises PlanError for what is no number of bytes or elements that a machine holds."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise PlanError(f"{str(value)[:100]} is no size")
    return value


def _check_whole(buckets: Sequence[WireBucket], metas: Mapping[str, TensorMeta]) -> None:
    received = dict.fromkeys(metas, 0)
    for slot in (slot for bucket in buckets for slot in bucket.slots):
        if slot.meta != metas[slot.name]:
            raise PlanError(f"weight {slot.name!r} comes in two shapes: {slot.meta} and {metas[slot.name]}")
        received[slot.name] += math.prod(slot.shape)
    for name, count in received.items():
        if count != math.prod(metas[name].shape):
            raise PlanError(
                f"weight {name!r} has {math.prod(metas[name].shape)} elements and the senders bring {count}: "
                "a sender is missing, or two bring the same part"
            )


def assemble(plan: WirePlan, buffers: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, whole: a view of its bucket where it came in one piece, else put together in
    memory of its own.

    buffers: one for each bucket of the plan. One weight at a time; order: of their first parts.
    """
    parts: dict[str, list[tuple[Slot, torch.Tensor]]] = {}
    for bucket, bytes_N in zip(plan.buckets, buffers, strict=True):
        for slot in bucket.slots:
            parts.setdefault(slot.name, []).append((slot, bytes_N))
    for name, pieces in parts.items():
        if len(pieces) == 1:
            yield name, pieces[0][0].view(pieces[0][1])
            continue
        meta = plan.metas[name]
        weight = torch.empty(meta.shape, dtype=meta.dtype, device=pieces[0][1].device)
        for slot, bytes_N in pieces:
            weight[tuple(slice(low, high) for low, high in slot.box)].copy_(slot.view(bytes_N))
        yield name, weight
