"""The assignment of every sender's bytes to buckets, computed once and the same every time.

A sender holds `Source`s: tensors seen as rows, in which boxes of Hugging Face tensors (`Part`s) lie
one after another. A trainer rank's sources are its Megatron parameters. A sender of full Hugging
Face tensors has one source of one part for each. Adjacent rows of a source leave as one block. So
few copies fill a bucket, however many parts (experts, heads) a block holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.errors import WeightsError
from lockstep_wire.plan import Box, Slot, TensorMeta, plan_json

# Views of any dtype start on their own size; one cache line suits every device's copies.
ALIGNMENT = 64
DEFAULT_BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class Part:
    """A box of a weight, which lies in a source from row `row` on.

    rows: how many of the source's rows it takes.

    The rows run over the box's first dimension that is longer than one; everything after it is one
    row.
    """

    meta: TensorMeta
    box: Box
    row: int
    rows: int

    def window(self, start: int, stop: int) -> Box:
        """The box of source rows [start, stop), which lie inside this part."""
        axis = next((i for i, (low, high) in enumerate(self.box) if high - low > 1), 0)
        if not self.box or self.rows == 1:
            return self.box
        low = self.box[axis][0] - self.row
        return (*self.box[:axis], (low + start, low + stop), *self.box[axis + 1 :])


@dataclass(frozen=True)
class Source:
    """A tensor that a sender hands out under `key`: `rows` rows of `width` elements. Rows that no
    part covers don't travel.
    """

    key: str
    dtype: torch.dtype
    rows: int
    width: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of the source `key`, at `offset` bytes of their bucket."""

    key: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Its contents for the sender (blocks) and for the receiver (slots), and its size in bytes."""

    blocks: tuple[Block, ...]
    slots: tuple[Slot, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Every bucket of one sender, in the order they travel."""

    sources: tuple[Source, ...]
    buckets: tuple[Bucket, ...]

    def slots(self) -> Iterable[Slot]:
        return (slot for bucket in self.buckets for slot in bucket.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, without the gaps between them."""
        return sum(slot.nbytes for slot in self.slots())

    @property
    def largest(self) -> int:
        """Bytes of the largest bucket."""
        return max((bucket.nbytes for bucket in self.buckets), default=0)


@dataclass(frozen=True)
class SyncPlan:
    """The plans of all senders, in rank order. Raises WeightsError when two of them ship the same
    part of a weight.
    """

    senders: tuple[Plan, ...]

    def __post_init__(self) -> None:
        boxes: dict[str, list[Box]] = {}
        for slot in (slot for plan in self.senders for slot in plan.slots()):
            boxes.setdefault(slot.meta.name, []).append(slot.box)
        twice = sorted(name for name, overlapping in boxes.items() if _overlap(overlapping))
        if twice:
            raise WeightsError(f"weights listed twice in a sync: {', '.join(twice[:5])}")

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.senders)

    def to_json(self) -> dict[str, Any]:
        """The receiver's plan, with an id that names this content."""
        return plan_json([(bucket.nbytes, bucket.slots) for bucket in plan.buckets] for plan in self.senders)


def _overlap(boxes: list[Box]) -> bool:
    """True if any two boxes share an element. Sorted by their first range, only neighbours that
    reach each other are compared.
    """
    boxes = sorted(boxes)
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if box and other[0][0] >= box[0][1]:
                break
            if all(low < stop and start < high for (low, high), (start, stop) in zip(box, other, strict=True)):
                return True
    return False


def full_source(meta: TensorMeta) -> Source:
    """A sender's source that is one whole weight: rows along its first dimension."""
    # What a row means follows the part's rule: a first dimension of one belongs to the row.
    axis = next((i for i, size in enumerate(meta.shape) if size > 1), 0)
    rows = meta.shape[axis] if meta.shape else 1
    width = math.prod(meta.shape) // rows if rows else 0
    return Source(meta.name, meta.dtype, rows, width, (Part(meta, meta.full_box, 0, rows),))


def make_plan(metas: Sequence[TensorMeta], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Plan:
    """The plan of a sender of whole weights."""
    return plan_sources([full_source(meta) for meta in metas], bucket_bytes)


def plan_sources(sources: Sequence[Source], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Plan:
    """Fills buckets in order. A full bucket cuts a source between rows, so only a single row can
    exceed the bucket size.
    """
    filling = _Filling(bucket_bytes)
    for source in sources:
        for parts in _runs(source):
            filling.add(source, parts)
    filling.close()
    return Plan(tuple(sources), tuple(filling.buckets))


def _runs(source: Source) -> Iterator[list[Part]]:
    """Parts of a source that follow each other without a gap."""
    run: list[Part] = []
    for part in source.parts:
        if part.rows and source.width:
            if run and run[-1].row + run[-1].rows != part.row:
                yield run
                run = []
            run.append(part)
    if run:
        yield run


class _Filling:
    """The bucket that is being filled, and those that are full."""

    def __init__(self, bucket_bytes: int) -> None:
        self.limit, self.used = bucket_bytes, 0
        self.buckets: list[Bucket] = []
        self.blocks: list[Block] = []
        self.slots: list[Slot] = []

    def close(self) -> None:
        if self.slots:
            self.buckets.append(Bucket(tuple(self.blocks), tuple(self.slots), self.used))
        self.blocks, self.slots, self.used = [], [], 0

    def add(self, source: Source, parts: list[Part]) -> None:
        row_bytes = source.width * source.dtype.itemsize
        row, stop = parts[0].row, parts[-1].row + parts[-1].rows
        while row < stop:
            offset = -(-self.used // ALIGNMENT) * ALIGNMENT
            room = (self.limit - offset) // row_bytes
            # A weight that fits into a bucket of its own is not cut for the sake of a few rows.
            fits = (stop - row) * row_bytes <= self.limit and room < stop - row
            if self.slots and (room < 1 or fits):
                self.close()
                continue
            end = min(stop, row + max(1, room))
            self.blocks.append(Block(source.key, row, end, offset))
            for part in parts:
                low, high = max(row, part.row), min(end, part.row + part.rows)
                if low < high:
                    self.slots.append(Slot(part.meta, part.window(low, high), offset + (low - row) * row_bytes))
            self.used = offset + (end - row) * row_bytes
            row = end
