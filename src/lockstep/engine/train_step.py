"""One training step over a PackedBatch, and scoring: rows dealt to data-parallel ranks, run through the stages, summed over everyone.

Shapes: R rows, S row length, N scored tokens of a row, P pairs (sequence, such a token), T tokens whose C most likely ids are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.batching.pack import minibatch_rows
from lockstep.batching.packed_batch import PackedBatch, ScoredRow, has_signal, scored_row, total_weight, unpacked_weight
from lockstep.batching.top_logprobs import TOP, hits
from lockstep.config.train import TrainConfig
from lockstep.engine.checks import Sums, check_average, check_records, check_tokens, gather_sums, picks_that_differ
from lockstep.engine.layers.compiled_ops import Compiled, compile_clock
from lockstep.engine.layers.lm_head import linear_logprob, most_likely
from lockstep.engine.losses.policy import (
    LossSums,
    compared_maxima,
    compared_sums,
    finish_metrics,
    policy_loss,
    scored_tensors,
)
from lockstep.engine.memory.recompute import plan as plan_recompute
from lockstep.engine.microbatch import BLOCK, PackedRow, packed_row, padded_length, padding_row
from lockstep.engine.optim.optimizer import OptimizerStep
from lockstep.engine.parallel import context, groups
from lockstep.engine.parallel.device import CUDA, device, peak_memory
from lockstep.engine.parallel.pipeline import forward_backward, forward_only
from lockstep.engine.routed_experts import check_routes
from lockstep.engine.state import TrainerState, reference_weights
from lockstep.engine.token_mismatch import TokenMismatch, worst_token
from lockstep.errors import DataError

PADDING = -1
"""Row number of a micro-batch that only keeps a rank in step with the others."""

_NONE = np.zeros(0, np.int64)
NOTHING = ScoredRow(_NONE, _NONE, _NONE, _NONE * 1.0, _NONE * 1.0, _NONE, _NONE, _NONE * 1.0, _NONE * 1.0, ())
"""What a padding row has to score."""

Report = Callable[[dict[str, Any]], None]


@dataclass
class Clock:
    """Seconds per phase, and where the work is now."""

    report: Report
    seconds: dict[str, float] = field(default_factory=dict)
    compiled: Compiled = field(default_factory=lambda: compile_clock().compiled)
    """What torch had compiled when the clock was started."""

    @contextmanager
    def phase(self, name: str):
        self.report({"kind": "phase", "phase": name})
        start = time.perf_counter()
        yield
        if CUDA:
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds of each phase; how often torch compiled since the start, and the seconds that took."""
        compiled = compile_clock().compiled
        return {f"seconds_{name}": value for name, value in self.seconds.items()} | {
            "compilations": float(compiled.count - self.compiled.count),
            "seconds_compile": compiled.seconds - self.compiled.seconds,
        }


@dataclass(frozen=True)
class MicroBatch:
    """A row on the device, what of it is scored, and its routes if they are replayed."""

    row: PackedRow
    scored: ScoredRow


def prepare(trainer: TrainerState, batch: PackedBatch, rows: Sequence[int]) -> list[MicroBatch]:
    """This data-parallel rank's rows, as many on every rank (padding rows fill up)."""
    replicas = groups.data().size()
    rank = groups.data().rank()
    mine = list(rows[rank::replicas])
    mine += [PADDING] * (-(-len(rows) // replicas) - len(mine))
    return [_micro_batch(trainer, batch, number) for number in mine]


def _unit(trainer: TrainerState) -> int:
    """Rows are cut to a multiple of this: shards of a row, and on GPU attention's blocks."""
    parts = trainer.parallel.tensor if trainer.parallel.sequence_parallel or trainer.config.is_moe else 1
    parts *= trainer.parallel.context
    return BLOCK * parts if CUDA else parts


def _micro_batch(trainer: TrainerState, batch: PackedBatch, number: int) -> MicroBatch:
    if number == PADDING:
        nothing = replace(NOTHING, top_PC=None if batch.top_PC is None else batch.top_PC[:0])
        return MicroBatch(padding_row(batch, padded_length(0, _unit(trainer)), device()), nothing)
    scored = scored_row(batch, number)
    if len(scored.predictor_N) and scored.predictor_N.min() < 0:
        raise DataError(
            f"row {number}: a scored token has no token before it; the first token of a sequence cannot be trained"
        )
    return MicroBatch(packed_row(batch, number, device(), _unit(trainer)), scored)


def _head(
    trainer: TrainerState, hidden: Tensor, predictor: np.ndarray, target: np.ndarray, temperature: np.ndarray
) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) of a row's scored tokens, on every rank; each computes those whose predictor is its own."""
    mine = context.owned(predictor)

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(hidden.device)

    found = linear_logprob(
        hidden,
        trainer.model.head_weight(),
        put(predictor[mine] // trainer.parallel.context),
        put(target[mine]),
        put(temperature[mine]),
        trainer.config.vocab_size,
        groups.tensor(),
        trainer.parallel.sequence_parallel,
    )
    logprob_N, entropy_N = (context.collect(one, mine, len(predictor)) for one in found)
    return logprob_N, entropy_N


def _most_likely(trainer: TrainerState, hidden: Tensor, predictor: np.ndarray, count: int) -> Tensor:
    """int32 `[N, count]` on the CPU of every rank; each computes those whose predictor is its own."""
    mine = context.owned(predictor)
    ids = most_likely(
        hidden,
        trainer.model.head_weight(),
        torch.from_numpy(predictor[mine] // trainer.parallel.context).to(hidden.device),
        count,
        trainer.config.vocab_size,
        groups.tensor(),
        trainer.parallel.sequence_parallel,
    )
    return context.collect(ids, mine, len(predictor)).to(torch.int32).cpu()


def _top_sums(trainer: TrainerState, hidden: Tensor, scored: ScoredRow) -> dict[str, Tensor]:
    """How far a row's most likely tokens agree with those that came with its rollouts, over what the trained step sampled: as sums."""
    assert scored.top_PC is not None
    known_P = scored.top_PC[:, 0] >= 0
    if scored.current_N is not None:
        known_P &= scored.current_N[scored.token_P]
    # Sequences that share a token have the same ids for it.
    token_T, first_T = np.unique(scored.token_P[known_P], return_index=True)
    trainer_TC = _most_likely(trainer, hidden, scored.predictor_N[token_T], TOP).numpy()
    top1, top20 = hits(scored.top_PC[known_P][first_T], trainer_TC)
    sums = {"top_tokens": float(len(token_T)), "top1": top1, "top20": top20}
    return {name: hidden.new_tensor(value, dtype=torch.float32) for name, value in sums.items()}


def _shard(trainer: TrainerState) -> int:
    """In how many parts a row's tokens are split between the layers."""
    return trainer.parallel.context * (trainer.parallel.tensor if trainer.parallel.sequence_parallel else 1)


def _logprobs(trainer: TrainerState, work: Sequence[MicroBatch]) -> list[Tensor]:
    """Detached log-probabilities of each row's scored tokens under the present weights; empty on all stages but the last."""
    found: list[Tensor] = [torch.empty(0)] * len(work)

    def last(number: int, hidden: Tensor) -> None:
        scored = work[number].scored
        found[number] = _head(trainer, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)[0].detach()

    forward_only(trainer.model, [w.row for w in work], last, _shard(trainer))
    return found


def train_step(
    trainer: TrainerState, batch: PackedBatch, config: TrainConfig, reference: Path | None, report: Report
) -> dict[str, float]:
    """All optimizer steps of one batch (`config.minibatches`). Returns metrics.

    A minibatch without signal (every advantage is 0, and no KL penalty) is not computed and changes nothing. If that is all of
    them, so is the whole step.

    Raises TrainerError when a loss or gradient is not finite and MismatchError when server and trainer disagree by more than
    `config.max_mismatch` on average or `config.max_token_mismatch` on one token. Every token that the trained step sampled counts,
    whatever its minibatch: both are decided before the first update, with weights unchanged. After a failure in a later minibatch
    the weights are those of the updates before it; `load` the last published step.
    """
    clock = Clock(report)
    if batch.rows % config.minibatches:
        raise DataError(
            f"a batch of {batch.rows} rows was not packed for {config.minibatches} minibatches; pack it for as many"
        )
    parts = [list(minibatch_rows(batch.rows, config.minibatches, index)) for index in range(config.minibatches)]
    trained = [number for number, part in enumerate(parts) if config.kl_coef > 0 or has_signal(batch, part)]
    if not trained:
        return _without_signal(trainer, config, clock)
    with clock.phase("prepare"):
        work = [prepare(trainer, batch, part) for part in parts]
        check_routes(batch, [micro.row for part in work for micro in part], trainer.config)
        recomputed = plan_recompute(trainer, max(micro.row.length for part in work for micro in part))
    references = _reference_logprobs(trainer, work, reference, clock)
    before = _compare(trainer, work, config, clock) if len(work) > 1 else None
    updates = []
    for number in trained:
        weight = total_weight(batch, parts[number]) + unpacked_weight(batch) / len(parts)
        # The first update differentiates the very policy that is the old one.
        olds = None if before is None or number == trained[0] else before.logprobs[number]
        updates.append(_update(trainer, work[number], weight, config, olds, references[number], clock, before is None))
    skipped = len(parts) - sum(update.norm > 0 for update in updates)
    metrics = _summary(trainer, batch, before, updates, clock)
    return metrics | {"layers_recomputed": float(recomputed), "updates_skipped": float(skipped)}


def _without_signal(trainer: TrainerState, config: TrainConfig, clock: Clock) -> dict[str, float]:
    """Metrics of a step that nothing was computed for."""
    zeros = dict.fromkeys(("loss", "loss_policy", "grad_norm", "tokens", "tokens_scored"), 0.0)
    zeros |= {"updates": float(trainer.optimizer.count), "updates_skipped": float(config.minibatches)}
    return zeros | {"no_signal": 1.0} | clock.metrics()


def _reference_logprobs(
    trainer: TrainerState, work: Sequence[Sequence[MicroBatch]], reference: Path | None, clock: Clock
) -> list[list[Tensor] | None]:
    if reference is None:
        return [None] * len(work)
    with clock.phase("reference"), reference_weights(trainer, reference):
        return [_logprobs(trainer, part) for part in work]


@dataclass(frozen=True)
class Compared:
    """The batch under the weights before the first update: log-probabilities of each minibatch, and how far the server's are."""

    logprobs: list[list[Tensor]]
    sums: Sums
    maxima: Sums
    picks: Sums


def _compare(
    trainer: TrainerState, work: Sequence[Sequence[MicroBatch]], config: TrainConfig, clock: Clock
) -> Compared:
    """A forward pass over all minibatches, which one update would not need: the policy before it is the one that is differentiated."""
    every = [micro for part in work for micro in part]
    logprobs: list[Tensor] = [torch.empty(0)] * len(every)
    rows: list[LossSums] = []
    worst: list[TokenMismatch] = []

    def last(number: int, hidden: Tensor) -> None:
        scored = every[number].scored
        new_N, _ = _head(trainer, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)
        logprobs[number] = new_N
        tensors = scored_tensors(scored, new_N)
        sums = compared_sums(tensors)
        if scored.top_PC is not None:
            sums |= _top_sums(trainer, hidden, scored)
        rows.append(LossSums(new_N.new_zeros(()), sums, compared_maxima(tensors)))
        if config.max_token_mismatch is not None:
            worst.append(worst_token(scored, new_N, config.max_token_mismatch))

    with clock.phase("old_logprobs"):
        trainer.model.replayed.clear()
        forward_only(trainer.model, [micro.row for micro in every], last, _shard(trainer))
    check_records(trainer, every)
    if config.max_token_mismatch is not None:
        check_tokens(trainer, worst, config.max_token_mismatch)
    sums, maxima = gather_sums(trainer, rows, every)
    check_average(trainer, sums, config.max_mismatch)
    size = len(work[0])
    parts = [logprobs[first : first + size] for first in range(0, len(every), size)]
    return Compared(parts, sums, maxima, picks_that_differ(trainer))


@dataclass(frozen=True)
class Update:
    """What came of one minibatch. norm: of its gradient; 0: the optimizer took no step."""

    sums: Sums
    maxima: Sums
    picks: Sums
    norm: float


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
    """One optimizer step. only: of a batch that has no other, so that its forward pass is the one to compare with the server."""
    if weight <= 0:
        raise DataError("no token in the batch carries weight; give at least one sampled token per batch")
    losses: list[LossSums] = []
    worst: list[TokenMismatch] = []

    def last(number: int, hidden: Tensor) -> Tensor:
        scored = work[number].scored
        new_N, entropy_N = _head(trainer, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)
        old_N = None
        if config.divides_by == "trainer":
            old_N = new_N.detach() if olds is None else olds[number]
        reference_N = None if references is None else references[number]
        loss = policy_loss(scored_tensors(scored, new_N, entropy_N.detach(), old_N, reference_N), config)
        if only and scored.top_PC is not None:
            loss.sums.update(_top_sums(trainer, hidden.detach(), scored))
        losses.append(loss)
        if only and config.max_token_mismatch is not None:
            worst.append(worst_token(scored, new_N.detach(), config.max_token_mismatch))
        return loss.loss / weight

    with clock.phase("forward_backward"):
        trainer.optimizer.zero()
        trainer.model.replayed.clear()
        forward_backward(trainer.model, [w.row for w in work], last, _shard(trainer))
    check_records(trainer, work)
    if only and config.max_token_mismatch is not None:
        check_tokens(trainer, worst, config.max_token_mismatch)
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
    return Update(sums | {"weight": weight}, maxima, picks_that_differ(trainer), norm)


def _summary(
    trainer: TrainerState, batch: PackedBatch, before: Compared | None, updates: Sequence[Update], clock: Clock
) -> dict[str, float]:
    """Sums of all updates are added up, maxima are maxima; what compares server and trainer is of the weights before the first."""
    sums = {name: sum(update.sums[name] for update in updates) for name in updates[0].sums}
    maxima = {name: max(update.maxima[name] for update in updates) for name in updates[0].maxima}
    if before is not None:
        sums, maxima = sums | before.sums, maxima | before.maxima
    metrics = finish_metrics(sums, maxima) | (updates[0] if before is None else before).picks
    metrics["grad_norm"] = float(np.mean([update.norm for update in updates]))
    metrics["no_signal"] = float(not any(update.norm > 0 for update in updates))
    used = int((batch.nodes_RS >= 0).sum())
    metrics |= {"tokens": float(used), "padding_share": 1.0 - used / batch.nodes_RS.size, "rows": float(batch.rows)}
    metrics |= {"updates": float(trainer.optimizer.count), "peak_memory_bytes": float(peak_memory())}
    busy = clock.seconds.get("forward_backward", 0.0)
    metrics["tokens_per_second"] = used / busy if busy else 0.0
    return metrics | clock.metrics()


def score(trainer: TrainerState, batch: PackedBatch, report: Report) -> np.ndarray:
    """float32 `[R, S]`: log-probability of every token given the ones before it in its sequence, NaN where there is none.

    Temperatures as in the batch. Every token with a predecessor is scored, whether it carries loss or not. On every rank.
    """
    return score_and_rank(trainer, batch, report, 0)[0]


def score_and_rank(
    trainer: TrainerState, batch: PackedBatch, report: Report, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """`score`, and where `count` is not 0 int32 `[R, S, count]`: the ids that were most likely in each token's place, best first,
    -1 where there is no prediction.
    """
    clock = Clock(report)
    values_RS = torch.zeros(batch.tokens_RS.shape, dtype=torch.float64)
    top_RSC = torch.zeros((*batch.tokens_RS.shape, count), dtype=torch.int32)
    replicas, rank = groups.data().size(), groups.data().rank()
    mine = list(range(batch.rows))[rank::replicas]
    trainer.model.replayed.clear()
    with clock.phase("score"):
        work = prepare(trainer, batch, list(range(batch.rows)))
        check_routes(batch, [micro.row for micro in work], trainer.config)

        def last(number: int, hidden: Tensor) -> None:
            if number >= len(mine):
                return
            at = mine[number]
            index_N = np.flatnonzero(batch.previous_RS[at] >= 0)
            predictor_N = batch.previous_RS[at, index_N].astype(np.int64)
            target_N = batch.tokens_RS[at, index_N].astype(np.int64)
            found, _ = _head(trainer, hidden, predictor_N, target_N, batch.temperatures_RS[at, index_N])
            values_RS[at, torch.from_numpy(index_N)] = found.double().cpu()
            if count:
                top_RSC[at, torch.from_numpy(index_N)] = _most_likely(trainer, hidden, predictor_N, count)

        forward_only(trainer.model, [w.row for w in work], last, _shard(trainer))
        check_records(trainer, work)
        values_RS = _sum_over_ranks(trainer, values_RS)
        top_RSC = _sum_over_ranks(trainer, top_RSC) if count else top_RSC
    predicted_RS = batch.previous_RS >= 0
    scores_RS = np.where(predicted_RS, values_RS.numpy(), np.nan).astype(np.float32)
    return scores_RS, np.where(predicted_RS[..., None], top_RSC.numpy(), np.int32(-1)) if count else None


def _sum_over_ranks(trainer: TrainerState, values_RS: Tensor) -> Tensor:
    """Each row was scored on one data-parallel rank's last stage (alike on its TP ranks)."""
    values_RS = values_RS.to(device())
    dist.all_reduce(values_RS, group=groups.data())
    dist.broadcast(values_RS, groups.last_stage(), group=groups.pipeline())
    return values_RS.cpu()
