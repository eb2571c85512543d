"""AdamW (and plain SGD) with fp32 masters, gradients summed over ranks, state split over replicas
(ZeRO-1).

Parameters that are summed and replicated alike share a bucket. A bucket is a flat buffer of
weights, of which the parameters are views, and a flat fp32 buffer of gradients, which hooks fill. A
step sums the gradients so that each replica gets one slice of the sum. The replica updates its
slice of masters and moments and gathers the new weights. With one replica the slice is everything.

Formulas: AdamW as in arXiv 1711.05101 and torch.optim.AdamW (decoupled decay, bias correction, eps
outside the root). Clipping by the global norm as in torch.nn.utils.clip_grad_norm_. State is fp32
(fp64 for fp64 models).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lockstep.config.megatron import Parallel
from lockstep.engine.optim.gradient_sums import counts_here, replica_group, sum_group, sum_over
from lockstep.engine.optim.trainable import Trainable, own_part
from lockstep.engine.optim.weight_decay import decays
from lockstep.engine.parallel.device import device
from lockstep.errors import TrainerError

ALIGN = 64
"""Every parameter starts at a multiple of this many elements: kernels want 16-byte addresses."""

STRIDE = 1 << 24
"""Elements updated at once, so that temporaries stay small."""


@dataclass(frozen=True)
class OptimizerStep:
    """The hyperparameters of one update. `max_norm` None: no clipping. kind "sgd": `w -= lr * (g +
    weight_decay * w)`.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float | None = 1.0
    kind: Literal["adamw", "sgd"] = "adamw"


class Bucket:
    """Parameters with the same gradient sums, dtype and weight decay. `low:high` is this replica's
    slice of the flat buffers.
    """

    def __init__(
        self,
        trainables: Sequence[Trainable],
        group: ProcessGroup,
        partial: ProcessGroup | None,
        counted: bool,
        master: torch.dtype | None = None,
        decays: bool = True,
    ) -> None:
        self.trainables, self.group, self.partial, self.counted = list(trainables), group, partial, counted
        self.decays = decays
        dtype = trainables[0].parameter.dtype
        self.offsets, total = [], 0
        for trainable in trainables:
            self.offsets.append(total)
            total += -(-trainable.parameter.numel() // ALIGN) * ALIGN
        unit = ALIGN * group.size()
        self.size = -(-total // unit) * unit
        self.low = self.size // group.size() * group.rank()
        self.high = self.low + self.size // group.size()
        wide, here = torch.promote_types(dtype, torch.float32), device()
        self.weights = torch.zeros(self.size, dtype=dtype, device=here)
        self.gradients = torch.zeros(self.size, dtype=wide, device=here)
        for trainable, offset in zip(trainables, self.offsets, strict=True):
            self._adopt(trainable.parameter, offset)
        self.master = self.weights[self.low : self.high].to(master or wide, copy=True)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)

    def _adopt(self, parameter: torch.nn.Parameter, offset: int) -> None:
        count, shape = parameter.numel(), parameter.shape
        view = self.weights[offset : offset + count].view(shape)
        view.copy_(parameter.data)
        parameter.data = view
        gradient = self.gradients[offset : offset + count].view(shape)

        def accumulate(filled: Tensor) -> None:
            gradient.add_(filled.grad)  # pyright: ignore[reportArgumentType]
            filled.grad = None

        parameter.register_post_accumulate_grad_hook(accumulate)

    def reduce(self) -> Tensor:
        """Sum the gradients; the slice that is this replica's."""
        if self.partial is not None:
            dist.all_reduce(self.gradients, group=self.partial)
        if self.group.size() > 1:
            summed = self.gradients.new_empty(len(self.master))
            dist.reduce_scatter_tensor(summed, self.gradients, group=self.group)
            self.gradients[self.low : self.high] = summed
        return self.gradients[self.low : self.high]

    def publish(self) -> None:
        """Round the masters into this replica's slice of the weights and share it."""
        own = self.weights[self.low : self.high]
        own.copy_(self.master)
        if self.group.size() > 1:
            dist.all_gather_into_tensor(self.weights, own.clone(), group=self.group)

    def slices(self) -> Iterator[tuple[Trainable, int, int, slice]]:
        """(parameter, first, last element of it, where they lie in the state) for what this replica
        holds.
        """
        for trainable, offset in zip(self.trainables, self.offsets, strict=True):
            first = max(self.low, offset)
            last = min(self.high, offset + trainable.parameter.numel())
            if first < last:
                yield trainable, first - offset, last - offset, slice(first - self.low, last - self.low)


def make_buckets(
    trainables: Sequence[Trainable], parallel: Parallel, tied: bool, master: torch.dtype | None = None
) -> list[Bucket]:
    """Group parameters by what their gradients need, dtype and weight decay. The order, and so
    every collective, is the same on all ranks of a group.
    """
    grouped: dict[tuple[object, ...], list[Trainable]] = {}
    for trainable in trainables:
        over = sum_over(trainable.name, parallel, tied)
        expert = trainable.domain.startswith("expert")
        key = (
            expert,
            over,
            trainable.domain if over == "none" else "",
            trainable.parameter.dtype,
            decays(trainable.name, tied),
            counts_here(trainable, over),
        )
        grouped.setdefault(key, []).append(trainable)
    ordered = sorted(grouped.items(), key=lambda item: tuple(str(part) for part in item[0][:5]))
    return [
        Bucket(ts, replica_group(ts[0]), sum_group(key[1]), bool(key[5]), master, bool(key[4]))  # pyright: ignore
        for key, ts in ordered
    ]


class Optimizer:
    """The trainable set of this rank and its state.

    master: dtype of masters and moments; None: the weights', fp32 at least.
    """

    def __init__(
        self, trainables: Sequence[Trainable], parallel: Parallel, tied: bool, master: torch.dtype | None = None
    ) -> None:
        self.buckets = make_buckets(trainables, parallel, tied, master)
        self.count = 0
        if master is not None:
            self.restore_weights()  # what is computed with is what a step publishes, from the first one on

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.gradients.zero_()

    def reduce(self) -> float:
        """Sum gradients over ranks and return their global norm. Raises TrainerError naming a
        parameter if it is not finite.
        """
        total = torch.zeros((), dtype=torch.float64, device=device())
        for bucket in self.buckets:
            gradient = bucket.reduce()
            if bucket.counted:
                for part in gradient.split(STRIDE):
                    total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        dist.all_reduce(total)
        norm = math.sqrt(total.item()) if math.isfinite(total.item()) else math.nan
        if not math.isfinite(norm):
            raise TrainerError(
                f"the gradient is not finite ({self._first_bad()}); weights are unchanged, lower the learning rate or check the rewards"
            )
        return norm

    def _first_bad(self) -> str:
        for bucket in self.buckets:
            for trainable, first, last, where in bucket.slices():
                if not bucket.gradients[bucket.low : bucket.high][where].isfinite().all():
                    return f"{trainable.name}, elements {first} to {last} of this rank"
        return "on another rank"

    @torch.no_grad()
    def step(self, rates: OptimizerStep, norm: float) -> None:
        """One update with the gradients `reduce` summed; they are cleared. `norm` is what `reduce`
        returned.
        """
        self.count += 1
        scale = 1.0 if rates.max_norm is None else min(1.0, rates.max_norm / (norm + 1e-6))
        update = _adamw if rates.kind == "adamw" else _sgd
        for bucket in self.buckets:
            gradient = bucket.gradients[bucket.low : bucket.high]
            for start in range(0, len(bucket.master), STRIDE):
                piece = slice(start, start + STRIDE)
                update(bucket, piece, gradient[piece].mul_(scale).to(bucket.master.dtype), rates, self.count)
            bucket.publish()
        self.zero()

    @torch.no_grad()
    def assign_masters(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill masters and weights from whole Hugging Face tensors by name. Raises WeightsError as
        `own_part` does; nothing is changed then.
        """
        filled = []
        for bucket in self.buckets:
            flat = torch.zeros(bucket.size, dtype=bucket.master.dtype)
            for trainable, offset in zip(bucket.trainables, bucket.offsets, strict=True):
                if trainable.pieces:
                    part = own_part(trainable, tensors).flatten()
                    flat[offset : offset + len(part)] = part
            filled.append(flat[bucket.low : bucket.high])
        for bucket, values in zip(self.buckets, filled, strict=True):
            bucket.master.copy_(values)
        self.restore_weights()

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Write the masters back into the model (after other weights were swapped in)."""
        for bucket in self.buckets:
            bucket.publish()


def _adamw(bucket: Bucket, piece: slice, gradient: Tensor, rates: OptimizerStep, count: int) -> None:
    first, second = rates.betas
    master, average, square = bucket.master[piece], bucket.exp_avg[piece], bucket.exp_avg_sq[piece]
    if bucket.decays:
        master.mul_(1 - rates.learning_rate * rates.weight_decay)
    average.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (square.sqrt() / math.sqrt(1 - second**count)).add_(rates.eps)
    master.addcdiv_(average, root, value=-rates.learning_rate / (1 - first**count))


def _sgd(bucket: Bucket, piece: slice, gradient: Tensor, rates: OptimizerStep, _count: int) -> None:
    master = bucket.master[piece]
    decay = rates.weight_decay if bucket.decays else 0.0
    master.add_(gradient.add(master, alpha=decay), alpha=-rates.learning_rate)
