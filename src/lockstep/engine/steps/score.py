"""Scores of a packed batch: log-probabilities, and the most likely ids.

Shapes: R rows, S row length, N scored tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.batching.packed_batch import PackedBatch
from lockstep.engine.parallel import groups
from lockstep.engine.parallel.device import device
from lockstep.engine.pipeline import forward_only
from lockstep.engine.rows.routed_experts import check_routed_experts
from lockstep.engine.state import TrainerState
from lockstep.engine.steps.checks import check_records
from lockstep.engine.steps.microbatch import PADDING, MicroBatch, prepare
from lockstep.engine.steps.scored_tokens import head_outputs, most_likely_tokens, row_shards
from lockstep.engine.timing import Clock, Report


def score(trainer: TrainerState, batch: PackedBatch, report: Report) -> np.ndarray:
    """Score a packed batch, at the batch's temperatures. Every token with a predecessor is scored,
    whether it carries loss or not.

    Returns float32 `[R, S]` on every rank: the log-probability of each token given the tokens
    before it in its sequence, in nats; NaN for a first token.
    """
    return score_and_rank(trainer, batch, report, 0)["logprobs_RS"]


def score_and_rank(trainer: TrainerState, batch: PackedBatch, report: Report, count: int) -> dict[str, np.ndarray]:
    """`logprobs_RS` as `score` gives them and, where `count` is not 0, of the `count` most likely
    tokens in each place, best first: `top_RSC`, int32 ids, -1 where there is no prediction; and
    `top_logprobs_RSC`, float32, at temperature 1.
    """
    clock = Clock(report)
    values_RS = torch.zeros(batch.tokens_RS.shape, dtype=torch.float64)
    top_RSC = torch.zeros((*batch.tokens_RS.shape, count), dtype=torch.int32)
    chances_RSC = torch.zeros(top_RSC.shape, dtype=torch.float32)
    replicas, rank = groups.data().size(), groups.data().rank()
    own_rows = list(range(batch.rows))[rank::replicas]
    trainer.model.replayed.clear()
    with clock.phase("score"):
        work = prepare(trainer, batch, list(range(batch.rows)))
        check_routed_experts(batch, [micro.row for micro in work], trainer.config)

        def last(number: int, hidden: Tensor) -> None:
            if number >= len(own_rows):
                return
            row = own_rows[number]
            index_N = np.flatnonzero(batch.previous_RS[row] >= 0)
            predictor_N = batch.previous_RS[row, index_N].astype(np.int64)
            target_N = batch.tokens_RS[row, index_N].astype(np.int64)
            logprob_N, _ = head_outputs(trainer, hidden, predictor_N, target_N, batch.temperatures_RS[row, index_N])
            values_RS[row, torch.from_numpy(index_N)] = logprob_N.double().cpu()
            if count:
                place = row, torch.from_numpy(index_N)
                top_RSC[place], chances_RSC[place] = most_likely_tokens(trainer, hidden, predictor_N, count)

        forward_only(trainer.model, [w.row for w in work], last, row_shards(trainer))
        check_records(trainer, work)
        values_RS = _sum_over_ranks(trainer, values_RS)
        if count:
            top_RSC, chances_RSC = (_sum_over_ranks(trainer, part) for part in (top_RSC, chances_RSC))
    predicted_RS = batch.previous_RS >= 0
    scores = {"logprobs_RS": np.where(predicted_RS, values_RS.numpy(), np.nan).astype(np.float32)}
    if count:
        scores["top_RSC"] = np.where(predicted_RS[..., None], top_RSC.numpy(), np.int32(-1))
        scores["top_logprobs_RSC"] = chances_RSC.numpy()
    return scores


def trained_logprobs(
    trainer: TrainerState, batch: PackedBatch, work: Sequence[MicroBatch], logprobs: Sequence[Tensor]
) -> np.ndarray:
    """float32 `[R, S]`: the log-probabilities that a training step computed for its scored tokens,
    NaN elsewhere. On every rank.

    logprobs: `[N]` for each of this rank's rows; empty on all stages but the last.
    """
    values_RS = torch.zeros(batch.tokens_RS.shape, dtype=torch.float64)
    for micro, logprob_N in zip(work, logprobs, strict=True):
        if micro.number != PADDING and len(logprob_N):
            values_RS[micro.number, torch.from_numpy(micro.scored.index_N)] = logprob_N.double().cpu()
    values_RS = _sum_over_ranks(trainer, values_RS)
    return np.where(batch.loss_mask_RS, values_RS.numpy(), np.nan).astype(np.float32)


def _sum_over_ranks(trainer: TrainerState, values_RS: Tensor) -> Tensor:
    """Each row was scored on one data-parallel rank's last stage (alike on its TP ranks)."""
    values_RS = values_RS.to(device())
    dist.all_reduce(values_RS, group=groups.data())
    dist.broadcast(values_RS, groups.last_stage(), group=groups.pipeline())
    return values_RS.cpu()
