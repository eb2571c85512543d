"""One training step over a PackedBatch: rows distributed round-robin over data-parallel ranks, run
through the stages, summed over all.

Shapes: R rows, S row length, N scored tokens of a row, P pairs (sequence, such a token), T tokens
whose C most likely ids are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file
from torch import Tensor

from lockstep.batching.pack import minibatch_rows
from lockstep.batching.packed_batch import PackedBatch, has_signal, loss_divisor
from lockstep.config.train import TrainConfig
from lockstep.engine.losses.policy import (
    LossSums,
    compared_maxima,
    compared_sums,
    finish_metrics,
    policy_loss,
    scored_tensors,
)
from lockstep.engine.memory.recompute import plan as plan_recompute
from lockstep.engine.optim.optimizer import OptimizerStep
from lockstep.engine.parallel.device import peak_memory
from lockstep.engine.pipeline import forward_backward, forward_only
from lockstep.engine.rows.routed_experts import check_routed_experts
from lockstep.engine.state import TrainerState, reference_weights
from lockstep.engine.steps.checks import (
    Sums,
    check_average,
    check_records,
    check_tokens,
    expert_choices_that_differ,
    gather_sums,
)
from lockstep.engine.steps.microbatch import MicroBatch, prepare
from lockstep.engine.steps.score import trained_logprobs
from lockstep.engine.steps.scored_tokens import head_outputs, logprobs_of_rows, row_shards, top_sums
from lockstep.engine.steps.token_mismatch import TokenMismatch, largest_mismatch
from lockstep.engine.timing import Clock, Report
from lockstep.errors import DataError


def train_step(
    trainer: TrainerState,
    batch: PackedBatch,
    config: TrainConfig,
    reference: Path | None,
    report: Report,
    logprobs_out: Path | None = None,
) -> dict[str, float]:
    """All optimizer steps of one batch (`config.minibatches` in each of `config.epochs`). Returns
    metrics.

    logprobs_out: rank 0 writes `logprobs_RS` there, float32 `[R, S]`: what the weights before the
        first update give the scored tokens, NaN elsewhere. No file where nothing is computed.

    A minibatch without signal (every advantage is 0, and no KL penalty or entropy bonus) is not
    computed and changes nothing. If that is all of them, so is the whole step.

    Raises TrainerError when a loss or gradient is not finite. Raises MismatchError when server and
    trainer disagree by more than `config.max_mismatch` on average or `config.max_token_mismatch` on
    one token. Every token that the trained step sampled counts, whatever its minibatch: both are
    decided before the first update, with weights unchanged. After a failure in a later minibatch
    the weights are those of the updates before it; `load` the last published step.
    """
    clock = Clock(report)
    if batch.rows % config.minibatches:
        raise DataError(
            f"a batch of {batch.rows} rows was not packed for {config.minibatches} minibatches; pack it for as many"
        )
    parts = [list(minibatch_rows(batch.rows, config.minibatches, index)) for index in range(config.minibatches)]
    trained = [number for number, part in enumerate(parts) if config.trains_without_signal or has_signal(batch, part)]
    if not trained:
        return _without_signal(trainer, config, clock)
    with clock.phase("prepare"):
        work = [prepare(trainer, batch, part) for part in parts]
        check_routed_experts(batch, [micro.row for part in work for micro in part], trainer.config)
        recomputed = plan_recompute(trainer, max(micro.row.length for part in work for micro in part))
    references = _reference_logprobs(trainer, work, reference, clock)
    before = _compare(trainer, work, config, clock) if len(parts) * config.epochs > 1 else None
    updates = []
    for number in trained * config.epochs:
        weight = loss_divisor(batch, parts[number], len(parts))
        # The first update differentiates the very policy that is the old one.
        olds = None if before is None or not updates else before.logprobs[number]
        updates.append(_update(trainer, work[number], weight, config, olds, references[number], clock, before is None))
    if logprobs_out is not None:
        _write_logprobs(trainer, batch, work, before, updates[0], logprobs_out)
    skipped = len(parts) * config.epochs - sum(update.norm > 0 for update in updates)
    metrics = _summary(trainer, batch, before, updates, clock)
    metrics["tokens_scored"] /= config.epochs
    metrics["tokens_per_second"] *= config.epochs
    return metrics | {"layers_recomputed": float(recomputed), "updates_skipped": float(skipped)}


def _write_logprobs(
    trainer: TrainerState,
    batch: PackedBatch,
    work: Sequence[Sequence[MicroBatch]],
    before: Compared | None,
    first: Update,
    file: Path,
) -> None:
    parts = [first.logprobs] if before is None else before.logprobs
    every, logprobs = list(chain.from_iterable(work)), list(chain.from_iterable(parts))
    values_RS = trained_logprobs(trainer, batch, every, logprobs)
    if dist.get_rank() == 0:
        save_file({"logprobs_RS": values_RS}, file)


def _without_signal(trainer: TrainerState, config: TrainConfig, clock: Clock) -> dict[str, float]:
    """Metrics of a step that nothing was computed for."""
    zeros = dict.fromkeys(("loss", "loss_policy", "grad_norm", "tokens", "tokens_scored"), 0.0)
    zeros |= {"updates": float(trainer.optimizer.count), "updates_skipped": float(config.minibatches * config.epochs)}
    return zeros | {"no_signal": 1.0} | clock.metrics()


def _reference_logprobs(
    trainer: TrainerState, work: Sequence[Sequence[MicroBatch]], reference: Path | None, clock: Clock
) -> list[list[Tensor] | None]:
    if reference is None:
        return [None] * len(work)
    with clock.phase("reference"), reference_weights(trainer, reference):
        return [logprobs_of_rows(trainer, part) for part in work]


@dataclass(frozen=True)
class Compared:
    """The batch under the weights before the first update: log-probabilities of each minibatch, and
    how far the server's are.
    """

    logprobs: list[list[Tensor]]
    sums: Sums
    maxima: Sums
    choices: Sums


def _compare(
    trainer: TrainerState, work: Sequence[Sequence[MicroBatch]], config: TrainConfig, clock: Clock
) -> Compared:
    """A forward pass over all minibatches, which one update would not need: the policy before it is
    the one that is differentiated.
    """
    every = [micro for part in work for micro in part]
    logprobs: list[Tensor] = [torch.empty(0)] * len(every)
    rows: list[LossSums] = []
    mismatches: list[TokenMismatch] = []

    def last(number: int, hidden: Tensor) -> None:
        scored = every[number].scored
        new_N, _ = head_outputs(trainer, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)
        logprobs[number] = new_N
        tensors = scored_tensors(scored, new_N)
        sums = compared_sums(tensors)
        if scored.top_PC is not None:
            sums |= top_sums(trainer, hidden, scored)
        rows.append(LossSums(new_N.new_zeros(()), sums, compared_maxima(tensors)))
        if config.max_token_mismatch is not None:
            mismatches.append(largest_mismatch(scored, new_N, config.max_token_mismatch))

    with clock.phase("old_logprobs"):
        trainer.model.replayed.clear()
        forward_only(trainer.model, [micro.row for micro in every], last, row_shards(trainer))
    check_records(trainer, every)
    if config.max_token_mismatch is not None:
        check_tokens(trainer, mismatches, config.max_token_mismatch)
    sums, maxima = gather_sums(trainer, rows, every)
    check_average(trainer, sums, config.max_mismatch)
    size = len(work[0])
    parts = [logprobs[first : first + size] for first in range(0, len(every), size)]
    return Compared(parts, sums, maxima, expert_choices_that_differ(trainer))


@dataclass(frozen=True)
class Update:
    """The result of one minibatch.

    norm: of its gradient; 0: the optimizer took no step.
    logprobs: of each row's scored tokens, before the step; only where there is no other update.
    """

    sums: Sums
    maxima: Sums
    choices: Sums
    norm: float
    logprobs: list[Tensor]


def _update(
    trainer: TrainerState,
    work: Sequence[MicroBatch],
    weight: float,
    config: TrainConfig,
    olds: Sequence[Tensor] | None,
    references: Sequence[Tensor] | None,
    clock: Clock,
    only: bool,
) -> Update:
    """One optimizer step.

    only: of a batch that has no other, so that its forward pass is the one to compare with the
        server.
    """
    if weight <= 0:
        raise DataError("no token in the batch carries weight; give at least one sampled token per batch")
    losses: list[LossSums] = []
    mismatches: list[TokenMismatch] = []
    logprobs: list[Tensor] = [torch.empty(0)] * len(work)

    def last(number: int, hidden: Tensor) -> Tensor:
        scored = work[number].scored
        new_N, entropy_N = head_outputs(trainer, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)
        old_N = None
        if config.divides_by == "trainer":
            old_N = new_N.detach() if olds is None else olds[number]
        reference_N = None if references is None else references[number]
        loss = policy_loss(scored_tensors(scored, new_N, entropy_N, old_N, reference_N), config)
        if only and scored.top_PC is not None:
            loss.sums.update(top_sums(trainer, hidden.detach(), scored))
        losses.append(loss)
        if only:
            logprobs[number] = new_N.detach()
        if only and config.max_token_mismatch is not None:
            mismatches.append(largest_mismatch(scored, new_N.detach(), config.max_token_mismatch))
        return loss.loss / weight

    with clock.phase("forward_backward"):
        trainer.optimizer.zero()
        trainer.model.replayed.clear()
        forward_backward(trainer.model, [w.row for w in work], last, row_shards(trainer))
    check_records(trainer, work)
    if only and config.max_token_mismatch is not None:
        check_tokens(trainer, mismatches, config.max_token_mismatch)
    sums, maxima = gather_sums(trainer, losses, work)
    if only:
        check_average(trainer, sums, config.max_mismatch)
    with clock.phase("optimizer"):
        norm = trainer.optimizer.reduce()
        if norm > 0:
            trainer.optimizer.step(
                OptimizerStep(
                    config.learning_rate, config.betas, config.eps, config.weight_decay, config.max_grad_norm
                ),
                norm,
            )
        else:  # nothing to learn from, and momentum alone must not move the weights
            trainer.optimizer.zero()
    return Update(sums | {"weight": weight}, maxima, expert_choices_that_differ(trainer), norm, logprobs)


def _summary(
    trainer: TrainerState, batch: PackedBatch, before: Compared | None, updates: Sequence[Update], clock: Clock
) -> dict[str, float]:
    """Sums of all updates are added up, maxima are maxima; what compares server and trainer is of
    the weights before the first.
    """
    sums = {name: sum(update.sums[name] for update in updates) for name in updates[0].sums}
    maxima = {name: max(update.maxima[name] for update in updates) for name in updates[0].maxima}
    if before is not None:
        sums, maxima = sums | before.sums, maxima | before.maxima
    metrics = finish_metrics(sums, maxima) | (updates[0] if before is None else before).choices
    metrics["grad_norm"] = float(np.mean([update.norm for update in updates]))
    metrics["no_signal"] = float(not any(update.norm > 0 for update in updates))
    used = int((batch.nodes_RS >= 0).sum())
    metrics |= {"tokens": float(used), "padding_share": 1.0 - used / batch.nodes_RS.size, "rows": float(batch.rows)}
    metrics |= {"updates": float(trainer.optimizer.count), "peak_memory_bytes": float(peak_memory())}
    busy = clock.seconds.get("forward_backward", 0.0)
    metrics["tokens_per_second"] = used / busy if busy else 0.0
    return metrics | clock.metrics()
