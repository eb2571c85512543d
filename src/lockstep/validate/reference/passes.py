"""A rank's forward and backward pass with a loss that any second implementation can compute: a slope
for every scored token.

Shapes: S row tokens, V vocabulary of this rank, P scored tokens of all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.batching.packed_batch import PackedBatch
from lockstep.engine.optim.state_file import rectangles
from lockstep.engine.parallel import groups
from lockstep.engine.parallel.device import device
from lockstep.engine.pipeline import forward_backward
from lockstep.engine.state import TrainerState
from lockstep.engine.steps.microbatch import MicroBatch, prepare
from lockstep.engine.steps.scored_tokens import head_outputs, row_shards

FLOOR = 1e-3
"""Gradients smaller than this share of the model's largest are compared with that instead of with
themselves: fp32 can't do better.
"""


def own_rows(batch: PackedBatch) -> list[int]:
    """The rows that this data-parallel rank runs."""
    return list(range(batch.rows))[groups.data().rank() :: groups.data().size()]


def run_passes(trainer: TrainerState, batch: PackedBatch, slope_P: np.ndarray) -> tuple[float, dict[int, Tensor]]:
    """(sum of slope times log-probability, logits `[S, V]` of each row this rank ran).

    Gradients are left in the optimizer.
    """
    work, rows = prepare(trainer, batch, list(range(batch.rows))), own_rows(batch)
    logits: dict[int, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64, device=device())

    def last(number: int, hidden: Tensor) -> Tensor:
        scored = work[number].scored
        new_N, _ = head_outputs(trainer, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)
        if number >= len(rows):  # padding: nothing is scored, but the backward pass must run
            return new_N.sum()
        logits[rows[number]] = _row_hidden(trainer, hidden) @ trainer.model.head_weight().detach().T
        loss = _row_loss(batch, rows[number], work[number], new_N, slope_P)
        total.add_(loss.detach().double())
        return loss

    trainer.optimizer.zero()
    forward_backward(trainer.model, [micro.row for micro in work], last, row_shards(trainer))
    return _everywhere(trainer, total), logits


def _row_loss(batch: PackedBatch, row: int, micro: MicroBatch, new_N: Tensor, slope_P: np.ndarray) -> Tensor:
    pairs = np.flatnonzero(np.repeat(batch.row_Q, np.diff(batch.scored_offsets_Q)) == row)
    token_P = torch.from_numpy(micro.scored.token_P).to(new_N.device)
    return (new_N[token_P] * torch.from_numpy(slope_P[pairs]).to(new_N)).sum()


def _row_hidden(trainer: TrainerState, hidden: Tensor) -> Tensor:
    """A row's hidden states `[S, H]` with the parts of all sequence- and context-parallel ranks."""
    rows = hidden.detach()[:, 0]
    if trainer.parallel.sequence_parallel:
        parts = [torch.empty_like(rows) for _ in range(trainer.parallel.tensor)]
        dist.all_gather(parts, rows.contiguous(), group=groups.tensor())
        rows = torch.cat(parts)
    if trainer.parallel.context > 1:
        parts = [torch.empty_like(rows) for _ in range(trainer.parallel.context)]
        dist.all_gather(parts, rows.contiguous(), group=groups.context())
        rows = torch.stack(parts, 1).flatten(0, 1)  # token i lives on rank i mod C
    return rows


def _everywhere(trainer: TrainerState, total: Tensor) -> float:
    if trainer.model.post_process:
        dist.all_reduce(total, group=groups.data())
    dist.broadcast(total, groups.last_stage(), group=groups.pipeline())
    return float(total)


def compare_tensors(trainer: TrainerState, kind: str, expected: dict[str, Tensor], floor: float) -> dict[str, float]:
    """Difference of this rank's slices from `expected`, by the names of the tensors.

    kind: "gradient", relative to each tensor's largest entry, which counts at least `floor`; or
        "weight", absolute, of the masters.
    """
    differences: dict[str, float] = {}
    for bucket in trainer.optimizer.buckets:
        values = bucket.gradients[bucket.low : bucket.high] if kind == "gradient" else bucket.master
        for trainable, first, last, place in bucket.slices():
            part = values[place].cpu()
            for box in rectangles(trainable, first, last):
                tensor = expected[box.name] if box.index is None else expected[box.name][box.index]
                wanted = tensor.reshape(len(tensor), -1)[box.rows, box.columns].reshape(-1)
                scale = max(float(tensor.abs().max()), floor) if kind == "gradient" else 1.0
                off = float((part[box.first : box.last] - wanted).abs().max()) / scale
                name = box.name if box.index is None else f"{box.name}[{box.index}]"
                largest = differences.get(name, -1.0)
                if not (off <= largest or math.isnan(largest)):
                    differences[name] = off
    return differences


def named_gradients(trainer: TrainerState) -> dict[str, Tensor]:
    """Gradients by canonical name, after the passes on one rank that holds everything."""
    return _named(trainer, "gradient")


def named_masters(trainer: TrainerState) -> dict[str, Tensor]:
    """The optimizer's masters by canonical name, on one rank that holds everything."""
    return _named(trainer, "weight")


def _named(trainer: TrainerState, kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for bucket in trainer.optimizer.buckets:
        values = bucket.gradients[bucket.low : bucket.high] if kind == "gradient" else bucket.master
        for trainable, first, last, place in bucket.slices():
            part = values[place].cpu()
            for box in rectangles(trainable, first, last):
                tensor = tensors.setdefault(box.name, part.new_zeros(trainer.shapes[box.name]))
                tensor = tensor if box.index is None else tensor[box.index]
                tensor.reshape(len(tensor), -1)[box.rows, box.columns] = part[box.first : box.last].view(
                    box.rows.stop - box.rows.start, -1
                )
    return tensors


def moved_tensors(
    trainer: TrainerState, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """By tensor, over this rank's masters: (sum of |difference from `after`|, sum of |`after` -
    `before`|).
    """
    sums: dict[str, tuple[float, float]] = {}
    for bucket in trainer.optimizer.buckets:
        for trainable, first, last, place in bucket.slices():
            part = bucket.master[place].cpu()
            for box in rectangles(trainable, first, last):
                start, wanted = (
                    tensors[box.name][box.rows, box.columns].reshape(-1).float() for tensors in (before, after)
                )
                difference, move = sums.get(box.name, (0.0, 0.0))
                difference += float((part[box.first : box.last] - wanted).abs().sum())
                sums[box.name] = difference, move + float((wanted - start).abs().sum())
    return sums
