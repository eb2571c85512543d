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

from lockstep.config import TrainConfig
from lockstep.engine import context, groups
from lockstep.engine.device import CUDA, device, peak_memory
from lockstep.engine.exchange import broadcast_json
from lockstep.engine.head import linear_logprob, most_likely
from lockstep.engine.loss import (
    MISMATCH_KEYS,
    LossSums,
    finish_metrics,
    policy_loss,
    reduce_sums,
    scored_tensors,
)
from lockstep.engine.optimizer import Rates
from lockstep.engine.pipeline import forward_backward, forward_only
from lockstep.engine.recompute import plan as plan_recompute
from lockstep.engine.regions import Compiled, compile_clock
from lockstep.engine.routes import account_of_row, check_routes
from lockstep.engine.session import Session, reference_weights
from lockstep.engine.tree import BLOCK, Row, padded_length, padding_row, row_of
from lockstep.engine.worst import Worst, worst_token
from lockstep.errors import DataError, MismatchError, TrainerError
from lockstep.tokens.batch import PackedBatch, ScoredRow, scored_row, total_weight
from lockstep.tokens.pack import minibatch_rows
from lockstep.tokens.top import TOP, hits

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

    row: Row
    scored: ScoredRow


def prepare(session: Session, batch: PackedBatch, rows: Sequence[int]) -> list[MicroBatch]:
    """This data-parallel rank's rows, as many on every rank (padding rows fill up)."""
    replicas = groups.data().size()
    rank = groups.data().rank()
    mine = list(rows[rank::replicas])
    mine += [PADDING] * (-(-len(rows) // replicas) - len(mine))
    return [_micro_batch(session, batch, number) for number in mine]


def _unit(session: Session) -> int:
    """Rows are cut to a multiple of this: shards of a row, and on GPU attention's blocks."""
    parts = session.parallel.tensor if session.parallel.sequence_parallel or session.config.is_moe else 1
    parts *= session.parallel.context
    return BLOCK * parts if CUDA else parts


def _micro_batch(session: Session, batch: PackedBatch, number: int) -> MicroBatch:
    if number == PADDING:
        nothing = replace(NOTHING, top_PC=None if batch.top_PC is None else batch.top_PC[:0])
        return MicroBatch(padding_row(batch, padded_length(0, _unit(session)), device()), nothing)
    scored = scored_row(batch, number)
    if len(scored.predictor_N) and scored.predictor_N.min() < 0:
        raise DataError(
            f"row {number}: a scored token has no token before it; the first token of a sequence cannot be trained"
        )
    return MicroBatch(row_of(batch, number, device(), _unit(session)), scored)


def _head(
    session: Session, hidden: Tensor, predictor: np.ndarray, target: np.ndarray, temperature: np.ndarray
) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) of a row's scored tokens, on every rank; each computes those whose predictor is its own."""
    mine = context.owned(predictor)

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(hidden.device)

    found = linear_logprob(
        hidden,
        session.model.head_weight(),
        put(predictor[mine] // session.parallel.context),
        put(target[mine]),
        put(temperature[mine]),
        session.config.vocab_size,
        groups.tensor(),
        session.parallel.sequence_parallel,
    )
    logprob_N, entropy_N = (context.collect(one, mine, len(predictor)) for one in found)
    return logprob_N, entropy_N


def _most_likely(session: Session, hidden: Tensor, predictor: np.ndarray, count: int) -> Tensor:
    """int32 `[N, count]` on the CPU of every rank; each computes those whose predictor is its own."""
    mine = context.owned(predictor)
    ids = most_likely(
        hidden,
        session.model.head_weight(),
        torch.from_numpy(predictor[mine] // session.parallel.context).to(hidden.device),
        count,
        session.config.vocab_size,
        groups.tensor(),
        session.parallel.sequence_parallel,
    )
    return context.collect(ids, mine, len(predictor)).to(torch.int32).cpu()


def _top_sums(session: Session, hidden: Tensor, scored: ScoredRow) -> dict[str, Tensor]:
    """How far a row's most likely tokens agree with those that came with its rollouts, over what the trained step sampled: as sums."""
    assert scored.top_PC is not None
    known_P = scored.top_PC[:, 0] >= 0
    if scored.current_N is not None:
        known_P &= scored.current_N[scored.token_P]
    # Sequences that share a token have the same ids for it.
    token_T, first_T = np.unique(scored.token_P[known_P], return_index=True)
    trainer_TC = _most_likely(session, hidden, scored.predictor_N[token_T], TOP).numpy()
    top1, top20 = hits(scored.top_PC[known_P][first_T], trainer_TC)
    sums = {"top_tokens": float(len(token_T)), "top1": top1, "top20": top20}
    return {name: hidden.new_tensor(value, dtype=torch.float32) for name, value in sums.items()}


def _shard(session: Session) -> int:
    """In how many parts a row's tokens are split between the layers."""
    return session.parallel.context * (session.parallel.tensor if session.parallel.sequence_parallel else 1)


def _logprobs(session: Session, work: Sequence[MicroBatch]) -> list[Tensor]:
    """Detached log-probabilities of each row's scored tokens under the present weights; empty on all stages but the last."""
    found: list[Tensor] = [torch.empty(0)] * len(work)

    def last(number: int, hidden: Tensor) -> None:
        scored = work[number].scored
        found[number] = _head(session, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)[0].detach()

    forward_only(session.model, [w.row for w in work], last, _shard(session))
    return found


def train_step(
    session: Session, batch: PackedBatch, config: TrainConfig, reference: Path | None, report: Report
) -> dict[str, float]:
    """All optimizer steps of one batch (`config.minibatches`). Returns metrics.

    Raises TrainerError when a loss or gradient is not finite and MismatchError when server and trainer disagree by more than
    `config.max_mismatch` on average or `config.max_token_mismatch` on one token: both before the
    first update, with weights unchanged. After a failure in a later minibatch the weights are those of the updates before it; `load`
    the last published step.
    """
    clock = Clock(report)
    if batch.rows % config.minibatches:
        raise DataError(
            f"a batch of {batch.rows} rows was not packed for {config.minibatches} minibatches; pack it for as many"
        )
    parts = [list(minibatch_rows(batch.rows, config.minibatches, index)) for index in range(config.minibatches)]
    with clock.phase("prepare"):
        work = [prepare(session, batch, part) for part in parts]
        check_routes(batch, [micro.row for part in work for micro in part], session.config)
        recomputed = plan_recompute(session, max(micro.row.length for part in work for micro in part))
    references = _reference_logprobs(session, work, reference, clock)
    olds = _old_logprobs(session, work, config, clock)
    results = []
    for number, micro_batches in enumerate(work):
        weight = total_weight(batch, parts[number])
        results.append(
            _update(session, micro_batches, weight, config, olds[number], references[number], clock, number == 0)
        )
    return _summary(session, batch, results, clock) | {"layers_recomputed": float(recomputed)}


def _reference_logprobs(
    session: Session, work: Sequence[Sequence[MicroBatch]], reference: Path | None, clock: Clock
) -> list[list[Tensor] | None]:
    if reference is None:
        return [None] * len(work)
    with clock.phase("reference"), reference_weights(session, reference):
        return [_logprobs(session, part) for part in work]


def _old_logprobs(
    session: Session, work: Sequence[Sequence[MicroBatch]], config: TrainConfig, clock: Clock
) -> list[list[Tensor] | None]:
    """With one update the policy before it is the one being differentiated, so no pass of its own is needed."""
    if config.old_logprobs == "sampling" or len(work) == 1:
        return [None] * len(work)
    with clock.phase("old_logprobs"):
        return [_logprobs(session, part) for part in work]


def _update(
    session: Session,
    work: Sequence[MicroBatch],
    weight: float,
    config: TrainConfig,
    olds: Sequence[Tensor] | None,
    references: Sequence[Tensor] | None,
    clock: Clock,
    first: bool,
) -> dict[str, float]:
    if weight <= 0:
        raise DataError("no token in the batch carries weight; give at least one sampled token per batch")
    losses: list[LossSums] = []
    worst: list[Worst] = []

    def last(number: int, hidden: Tensor) -> Tensor:
        scored = work[number].scored
        new_N, entropy_N = _head(session, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)
        old_N = (
            new_N.detach()
            if config.old_logprobs == "trainer" and olds is None
            else None
            if olds is None
            else olds[number]
        )
        reference_N = None if references is None else references[number]
        loss = policy_loss(scored_tensors(scored, new_N, entropy_N.detach(), old_N, reference_N), config)
        if first and scored.top_PC is not None:
            loss.sums.update(_top_sums(session, hidden.detach(), scored))
        losses.append(loss)
        if first and config.max_token_mismatch is not None:
            worst.append(worst_token(scored, new_N.detach(), config.max_token_mismatch))
        return loss.loss / weight

    with clock.phase("forward_backward"):
        session.optimizer.zero()
        session.model.replayed.clear()
        forward_backward(session.model, [w.row for w in work], last, _shard(session))
    check_records(session, work)
    if first and config.max_token_mismatch is not None:
        _check_tokens(session, worst, config.max_token_mismatch)
    metrics = _gather_metrics(session, losses, work) | picks_that_differ(session)
    if first and config.max_mismatch is not None and metrics.get("mismatch", 0.0) > config.max_mismatch:
        session.optimizer.zero()
        raise MismatchError(
            f"server and trainer disagree by {metrics['mismatch']:.4f} nats per token on average, more than max_mismatch = "
            f"{config.max_mismatch}; weights are unchanged: check that the server holds the version the rollouts name"
        )
    with clock.phase("optimizer"):
        norm = session.optimizer.reduce()
        session.optimizer.step(
            Rates(config.learning_rate, config.betas, config.eps, config.weight_decay, config.max_grad_norm), norm
        )
    return metrics | {"grad_norm": norm}


def _check_tokens(session: Session, found: Sequence[Worst], limit: float) -> None:
    """Raise MismatchError on every rank if any rank's row has a token beyond `limit`, naming the worst."""
    mine = max(found, key=lambda one: one.excess, default=Worst())
    everyone: list[Worst] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    worst = max(everyone, key=lambda one: one.excess)
    if worst.excess > 0:
        session.optimizer.zero()
        raise MismatchError(
            f"{worst.name}: server and trainer disagree by {worst.difference:.2e} nats on a token of log-probability "
            f"{worst.logprob:.4f}, more than max_token_mismatch = {limit:g}; weights are unchanged"
        )


def check_records(session: Session, work: Sequence[MicroBatch]) -> None:
    """Raise TrainerError, on every rank, unless the routers of all ranks used each record of these rows exactly once."""
    if not session.config.is_moe or all(micro.row.routes_SLK is None for micro in work):
        return
    sums = torch.zeros(2, dtype=torch.int64, device=device())
    sums[0] = session.model.replayed.used
    if groups.first_of_replica():
        for micro in work:
            assert micro.row.routes_SLK is not None
            sums[1] += account_of_row(micro.row.routes_SLK, micro.row.index)
    dist.all_reduce(sums)
    used, recorded = sums.tolist()
    if used != recorded:
        session.optimizer.zero()
        raise TrainerError(
            "expert replay is broken: the routers did not use every recorded choice exactly once, at its own token and layer; "
            "weights are unchanged. Train with enable_expert_replay=False, and report this with the parallel sizes"
        )


def picks_that_differ(session: Session) -> dict[str, float]:
    """`picks_differ`: share of the replayed picks that the routers here would not have made. Nothing without replay."""
    if not session.config.is_moe:
        return {}
    counts = session.model.replayed.picks.clone()
    dist.all_reduce(counts)
    differing, compared = counts.tolist()
    return {"picks_differ": differing / compared} if compared else {}


def _gather_metrics(session: Session, losses: Sequence[LossSums], work: Sequence[MicroBatch]) -> dict[str, float]:
    """The same metrics on every rank. Raises TrainerError, also everywhere, if a row's loss is not finite."""
    message: dict[str, Any] = {}
    if session.model.post_process:
        sums, maxima = reduce_sums(losses)
        group = groups.data()
        for values, operation in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
            names = sorted(values)
            stacked = torch.stack([values[name].double() for name in names])
            dist.all_reduce(stacked, operation, group=group)
            values.update(zip(names, stacked.cpu(), strict=True))
        if np.isfinite(float(sums["loss"])):
            message = {"metrics": finish_metrics(sums, maxima)}
        else:
            bad = [w.scored.names_Q for w, part in zip(work, losses, strict=True) if not part.loss.isfinite()]
            message = {"bad": ", ".join(bad[0][:4]) if bad else "on another data-parallel rank"}
    message = broadcast_json(message, groups.last_stage(), groups.pipeline())
    if "bad" in message:
        session.optimizer.zero()
        raise TrainerError(
            f"the loss is not finite (sequences {message['bad']}); weights are unchanged, check rewards and logprobs"
        )
    return message["metrics"]


def _summary(
    session: Session, batch: PackedBatch, results: Sequence[dict[str, float]], clock: Clock
) -> dict[str, float]:
    metrics = {name: float(np.mean([r[name] for r in results if name in r])) for name in results[0]}
    metrics |= {name: results[0][name] for name in MISMATCH_KEYS if name in results[0]}
    used = int((batch.nodes_RS >= 0).sum())
    metrics |= {"tokens": float(used), "padding_share": 1.0 - used / batch.nodes_RS.size, "rows": float(batch.rows)}
    metrics |= {"updates": float(session.optimizer.count), "peak_memory_bytes": float(peak_memory())}
    busy = clock.seconds.get("forward_backward", 0.0)
    metrics["tokens_per_second"] = used / busy if busy else 0.0
    return metrics | clock.metrics()


def score(session: Session, batch: PackedBatch, report: Report) -> np.ndarray:
    """float32 `[R, S]`: log-probability of every token given the ones before it in its sequence, NaN where there is none.

    Temperatures as in the batch. Every token with a predecessor is scored, whether it carries loss or not. On every rank.
    """
    return score_and_rank(session, batch, report, 0)[0]


def score_and_rank(
    session: Session, batch: PackedBatch, report: Report, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """`score`, and where `count` is not 0 int32 `[R, S, count]`: the ids that were most likely in each token's place, best first,
    -1 where there is no prediction.
    """
    clock = Clock(report)
    values_RS = torch.zeros(batch.tokens_RS.shape, dtype=torch.float64)
    top_RSC = torch.zeros((*batch.tokens_RS.shape, count), dtype=torch.int32)
    replicas, rank = groups.data().size(), groups.data().rank()
    mine = list(range(batch.rows))[rank::replicas]
    session.model.replayed.clear()
    with clock.phase("score"):
        work = prepare(session, batch, list(range(batch.rows)))
        check_routes(batch, [micro.row for micro in work], session.config)

        def last(number: int, hidden: Tensor) -> None:
            if number >= len(mine):
                return
            at = mine[number]
            index_N = np.flatnonzero(batch.previous_RS[at] >= 0)
            predictor_N = batch.previous_RS[at, index_N].astype(np.int64)
            target_N = batch.tokens_RS[at, index_N].astype(np.int64)
            found, _ = _head(session, hidden, predictor_N, target_N, batch.temperatures_RS[at, index_N])
            values_RS[at, torch.from_numpy(index_N)] = found.double().cpu()
            if count:
                top_RSC[at, torch.from_numpy(index_N)] = _most_likely(session, hidden, predictor_N, count)

        forward_only(session.model, [w.row for w in work], last, _shard(session))
        check_records(session, work)
        values_RS = _sum_over_ranks(session, values_RS)
        top_RSC = _sum_over_ranks(session, top_RSC) if count else top_RSC
    predicted_RS = batch.previous_RS >= 0
    scores_RS = np.where(predicted_RS, values_RS.numpy(), np.nan).astype(np.float32)
    return scores_RS, np.where(predicted_RS[..., None], top_RSC.numpy(), np.int32(-1)) if count else None


def _sum_over_ranks(session: Session, values_RS: Tensor) -> Tensor:
    """Each row was scored on one data-parallel rank's last stage (alike on its TP ranks)."""
    values_RS = values_RS.to(device())
    dist.all_reduce(values_RS, group=groups.data())
    dist.broadcast(values_RS, groups.last_stage(), group=groups.pipeline())
    return values_RS.cpu()
