"""The checks of a step before the weights change: finite losses, every record replayed once, server
and trainer in agreement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from lockstep.engine.losses.policy import LossSums, reduce_sums
from lockstep.engine.parallel import groups
from lockstep.engine.parallel.broadcast import broadcast_json, everyones_json
from lockstep.engine.parallel.device import device
from lockstep.engine.rows.routed_experts import account_of_row
from lockstep.engine.steps.token_mismatch import TokenMismatch
from lockstep.errors import MismatchError, TrainerError

if TYPE_CHECKING:
    from lockstep.engine.state import TrainerState
    from lockstep.engine.steps.microbatch import MicroBatch

Sums = dict[str, float]


def gather_sums(trainer: TrainerState, losses: Sequence[LossSums], work: Sequence[MicroBatch]) -> tuple[Sums, Sums]:
    """(sums, maxima) over all ranks, on every rank. Raises TrainerError, also everywhere, if a
    row's loss is not finite.
    """
    message: dict[str, Any] = {}
    if trainer.model.post_process:
        sums, maxima = reduce_sums(losses)
        group = groups.data()
        for values, operation in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
            names = sorted(values)
            stacked = torch.stack([values[name].double() for name in names])
            dist.all_reduce(stacked, operation, group=group)
            values.update(zip(names, stacked.cpu(), strict=True))
        if np.isfinite(float(sums.get("loss", 0.0))):
            message = {"sums": _floats(sums), "maxima": _floats(maxima)}
        else:
            bad = [w.scored.names_Q for w, part in zip(work, losses, strict=True) if not part.loss.isfinite()]
            message = {"bad": ", ".join(bad[0][:4]) if bad else "on another data-parallel rank"}
    message = broadcast_json(message, groups.last_stage(), groups.pipeline())
    if "bad" in message:
        trainer.optimizer.zero()
        raise TrainerError(
            f"the loss is not finite (sequences {message['bad']}); weights are unchanged, check rewards and logprobs"
        )
    return message["sums"], message["maxima"]


def _floats(values: Mapping[str, Any]) -> Sums:
    return {name: float(value) for name, value in values.items()}


def check_average(trainer: TrainerState, sums: Sums, limit: float | None) -> None:
    """Raise MismatchError if server and trainer disagree by more than `limit` nats per token that
    the trained step sampled.
    """
    if limit is None or not sums["current"]:
        return
    mismatch = sums["drift_abs"] / sums["current"]
    if not mismatch <= limit:  # also where it is NaN
        trainer.optimizer.zero()
        raise MismatchError(
            f"server and trainer disagree by {mismatch:.4f} nats per token on average, more than max_mismatch = "
            f"{limit}; weights are unchanged: check that the server holds the version the rollouts name"
        )


def check_tokens(trainer: TrainerState, rows: Sequence[TokenMismatch], limit: float) -> None:
    """Raise MismatchError on every rank if any rank's row has a token beyond `limit`, naming the
    largest.
    """
    here = max(rows, key=lambda token: token.excess, default=TokenMismatch())
    everywhere = [TokenMismatch(**fields) for fields in everyones_json(dataclasses.asdict(here))]
    largest = max(everywhere, key=lambda token: token.excess)
    if largest.excess > 0:
        trainer.optimizer.zero()
        raise MismatchError(
            f"{largest.name}: server and trainer disagree by {largest.difference:.2e} nats on a token of log-probability "
            f"{largest.logprob:.4f}, more than max_token_mismatch = {limit:g}; weights are unchanged"
        )


def check_records(trainer: TrainerState, work: Sequence[MicroBatch]) -> None:
    """Raise TrainerError, on every rank, unless the routers of all ranks used each record of these
    rows exactly once.
    """
    if not trainer.config.is_moe or all(micro.row.experts_SLK is None for micro in work):
        return
    sums = torch.zeros(2, dtype=torch.int64, device=device())
    sums[0] = trainer.model.replayed.used
    if groups.first_of_replica():
        for micro in work:
            assert micro.row.experts_SLK is not None
            sums[1] += account_of_row(micro.row.experts_SLK, micro.row.index)
    dist.all_reduce(sums)
    used, recorded = sums.tolist()
    if used != recorded:
        trainer.optimizer.zero()
        raise TrainerError(
            "expert replay is broken: the routers did not use every recorded choice exactly once, at its own token and layer; "
            "weights are unchanged. Train with enable_expert_replay=False, and report this with the parallel sizes"
        )


def expert_choices_that_differ(trainer: TrainerState) -> dict[str, float]:
    """`expert_choices_differ`: share of the replayed choices that the routers here would not have
    made. Nothing without replay.
    """
    if not trainer.config.is_moe:
        return {}
    counts = trainer.model.replayed.choices.clone()
    dist.all_reduce(counts)
    differing, compared = counts.tolist()
    return {"expert_choices_differ": differing / compared} if compared else {}
