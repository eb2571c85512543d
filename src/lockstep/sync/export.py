"""Fills a plan's buckets from a stream of weights, with two buffers: one travels while the next is filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from lockstep.errors import WeightsError
from lockstep.sync.plan import Bucket, Plan, Slot, TensorMeta


def describe(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[TensorMeta]:
    """Names, dtypes and shapes of a stream, for `make_plan`. Consumes it."""
    return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]


class BucketFiller:
    """Two buffers of the largest bucket's size, kept from sync to sync."""

    def __init__(self, plan: Plan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self._buffers = [torch.zeros(plan.largest, dtype=torch.uint8, device=device) for _ in range(2)]

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[int, Bucket, torch.Tensor]]:
        """Yields (index, bucket, bytes_N) in the plan's order; the bytes stay valid until the yield after the next.

        Raises WeightsError when the stream differs from the plan in a name, its order, a dtype, a shape or its end.
        """
        stream = iter(tensors)
        for index, bucket in enumerate(self.plan.buckets):
            bytes_N = self._buffers[index % 2][: bucket.nbytes]
            for slot in bucket.slots:
                slot.view(bytes_N).copy_(_next(stream, slot))
            yield index, bucket, bytes_N
        extra = next(stream, None)
        if extra is not None:
            raise WeightsError(f"the weights to send go on after the plan's end, with {extra[0]!r}: make a new plan")


def _next(stream: Iterator[tuple[str, torch.Tensor]], slot: Slot) -> torch.Tensor:
    found = next(stream, None)
    if found is None:
        raise WeightsError(f"the weights to send end before {slot.meta.name!r}, which the plan lists")
    name, tensor = found
    actual = TensorMeta(name, tensor.dtype, tuple(tensor.shape))
    if actual != slot.meta:
        raise WeightsError(f"the weights to send differ from the plan: expected {slot.meta}, got {actual}")
    return tensor.detach()
