"""Faults between the ranks of a parallel layout. Each takes the trainer of its rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from lockstep.batching.packed_batch import PackedBatch, loss_divisor
from lockstep.engine.optim.optimizer import OptimizerStep
from lockstep.engine.parallel import groups
from lockstep.engine.state import TrainerState
from lockstep.engine.steps import train_step as step_module
from lockstep.validate.faults.fault import Fault, replaced

CORRECTNESS = "correctness"


@contextmanager
def all_reduce_skipped(trainer: TrainerState) -> Iterator[None]:
    """Each rank keeps the gradient of its own rows."""

    def own(bucket: Any) -> Any:
        def reduce() -> Tensor:
            return bucket.gradients[bucket.low : bucket.high]

        return reduce

    with ExitStack() as stack:
        for bucket in trainer.optimizer.buckets:
            stack.enter_context(replaced(bucket, "reduce", own(bucket)))
        yield


@contextmanager
def mean_over_ranks(trainer: TrainerState) -> Iterator[None]:
    def averaged(bucket: Any) -> Any:
        honest = bucket.reduce
        return lambda: honest().div_(groups.replicas().size())

    with ExitStack() as stack:
        for bucket in trainer.optimizer.buckets:
            stack.enter_context(replaced(bucket, "reduce", averaged(bucket)))
        yield


@contextmanager
def local_normalisation(_trainer: TrainerState) -> Iterator[None]:
    """Each rank divides its loss by the weight of its own rows."""

    def own_divisor(batch: PackedBatch, rows: Iterable[int], minibatches: int) -> float:
        own_rows = list(rows)[groups.data().rank() :: groups.data().size()]
        return loss_divisor(batch, own_rows, minibatches)

    with replaced(step_module, "loss_divisor", own_divisor):
        yield


@contextmanager
def minibatch_left_out(trainer: TrainerState) -> Iterator[None]:
    """The last update of a step is computed and not applied."""
    honest, updates = trainer.optimizer.step, {"count": 0}

    def step(rates: OptimizerStep, norm: float) -> None:
        updates["count"] += 1
        if updates["count"] == 2:
            trainer.optimizer.zero()
        else:
            honest(rates, norm)

    with replaced(trainer.optimizer, "step", step):
        yield


LAYOUT_FAULTS = (
    Fault("gradient all-reduce skipped", "data-parallel ranks train apart", CORRECTNESS, "data parallel",
          all_reduce_skipped),
    Fault("a sum over ranks turned into a mean", "a framework's default averages gradients", CORRECTNESS,
          "data parallel", mean_over_ranks),
    Fault("global normalisation made local", "each rank divides by its own number of tokens", CORRECTNESS,
          "data parallel", local_normalisation),
    Fault("a minibatch left out", "a loop over minibatches ends early", CORRECTNESS, "data parallel",
          minibatch_left_out),
)  # fmt: skip
"""Planted in both ranks of a data-parallel layout."""
