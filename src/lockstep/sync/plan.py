"""Which tensor goes into which bucket, at which offset: computed once, shared by both sides, the same every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Views of any dtype start on their own size; one cache line suits every device's copies.
ALIGNMENT = 64
DEFAULT_BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorMeta:
    """Name (of the Hugging Face checkpoint), dtype and shape of one weight as it travels."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """A tensor's place in its bucket."""

    meta: TensorMeta
    offset: int

    def view(self, bucket_N: torch.Tensor) -> torch.Tensor:
        """The tensor inside a bucket of bytes."""
        stop = self.offset + self.meta.nbytes
        return bucket_N[self.offset : stop].view(self.meta.dtype).view(self.meta.shape)


@dataclass(frozen=True)
class Bucket:
    """Slots in order, and the bucket's size in bytes."""

    slots: tuple[Slot, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Every bucket of a sync, in the order they travel."""

    buckets: tuple[Bucket, ...]

    def __post_init__(self) -> None:
        names = [slot.meta.name for slot in self.slots()]
        if len(names) != len(set(names)):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"weights listed twice in a sync: {', '.join(twice)}")

    def slots(self) -> Iterable[Slot]:
        return (slot for bucket in self.buckets for slot in bucket.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, without the gaps between them."""
        return sum(slot.meta.nbytes for slot in self.slots())

    @property
    def largest(self) -> int:
        """Bytes of the largest bucket."""
        return max((bucket.nbytes for bucket in self.buckets), default=0)

    def to_json(self) -> dict[str, Any]:
        """What the receiver needs, with an id that names this content."""
        buckets = [
            {
                "nbytes": bucket.nbytes,
                "slots": [
                    [slot.meta.name, str(slot.meta.dtype).removeprefix("torch."), list(slot.meta.shape), slot.offset]
                    for slot in bucket.slots
                ],
            }
            for bucket in self.buckets
        ]
        text = json.dumps(buckets, separators=(",", ":"))
        return {"id": hashlib.sha256(text.encode()).hexdigest(), "buckets": buckets}


def make_plan(metas: Sequence[TensorMeta], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Plan:
    """Fills buckets in order;

    a bucket is closed before the tensor that would overfill it, a larger tensor gets its own.
    """
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    used = 0
    for meta in metas:
        offset = -(-used // ALIGNMENT) * ALIGNMENT
        if slots and offset + meta.nbytes > bucket_bytes:
            buckets.append(Bucket(tuple(slots), used))
            slots, offset = [], 0
        slots.append(Slot(meta, offset))
        used = offset + meta.nbytes
    if slots:
        buckets.append(Bucket(tuple(slots), used))
    return Plan(tuple(buckets))
