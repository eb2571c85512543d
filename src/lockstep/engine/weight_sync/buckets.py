"""Fills a plan's buckets from a stream of weights, with two buffers: one travels while the next is
filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from lockstep.engine.weight_sync.plan import Block, Bucket, Plan, Source
from lockstep.errors import WeightsError
from lockstep_wire.plan import TensorMeta


def describe(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[TensorMeta]:
    """Names, dtypes and shapes of a stream, for `make_plan`. Consumes it."""
    return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]


class BucketFiller:
    """Two buffers of the largest bucket's size, kept from sync to sync, and the place of every
    block in them.
    """

    def __init__(self, plan: Plan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self._buffers = [torch.zeros(plan.largest, dtype=torch.uint8, device=device) for _ in range(2)]
        sources = {source.key: source for source in plan.sources}
        self._places = [self._views(index, sources) for index in range(len(plan.buckets))]

    def _views(self, index: int, sources: dict[str, Source]) -> list[torch.Tensor]:
        views = []
        for block in self.plan.buckets[index].blocks:
            source, rows = sources[block.key], block.stop - block.start
            end = block.offset + rows * source.width * source.dtype.itemsize
            bytes_N = self._buffers[index % 2][block.offset : end]
            views.append(bytes_N.view(source.dtype).view(rows, source.width))
        return views

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[int, Bucket, torch.Tensor]]:
        """Yields (index, bucket, bytes_N) in the plan's order; the bytes stay valid until the yield
        after the next.

        tensors: (key, tensor) of every source of the plan, in order. On a GPU everything is queued
            on the current stream, a bucket's blocks in few kernels.

        Raises WeightsError when the stream differs from the plan in a key, its order, a dtype, a
        size or its end.
        """
        stream = _Stream(self.plan, tensors)
        for index, bucket in enumerate(self.plan.buckets):
            rows = [stream.rows(block) for block in bucket.blocks]
            torch._foreach_copy_(self._places[index], rows)
            yield index, bucket, self._buffers[index % 2][: bucket.nbytes]
        stream.finish()


class _Stream:
    """The sources in the plan's order, each checked when it comes and held until the next one is
    asked for.
    """

    def __init__(self, plan: Plan, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._expected = iter(plan.sources)
        self._tensors = iter(tensors)
        self._key: str | None = None
        self._held = torch.empty(0)

    def rows(self, block: Block) -> torch.Tensor:
        while self._key != block.key:
            self._next(next(self._expected))
        return self._held[block.start : block.stop]

    def finish(self) -> None:
        for source in self._expected:  # those that hold nothing
            self._next(source)
        extra = next(self._tensors, None)
        if extra is not None:
            raise WeightsError(f"the weights to send go on after the plan's end, with {extra[0]!r}: make a new plan")

    def _next(self, source: Source) -> None:
        entry = next(self._tensors, None)
        if entry is None:
            raise WeightsError(f"the weights to send end before {source.key!r}, which the plan lists")
        key, tensor = entry
        same = key == source.key and tensor.dtype == source.dtype and tensor.numel() == source.rows * source.width
        if (
            same and source.parts and source.key == source.parts[0].meta.name
        ):  # a whole weight: its shape must be its own
            same = tuple(tensor.shape) == source.parts[0].meta.shape
        if not same:
            shape = source.parts[0].meta.shape if len(source.parts) == 1 else (source.rows, source.width)
            raise WeightsError(
                f"the weights to send differ from the plan: expected {source.key!r} {shape} {source.dtype}, "
                f"got {key!r} {tuple(tensor.shape)} {tensor.dtype}"
            )
        self._key, self._held = key, tensor.detach().reshape(source.rows, source.width)
