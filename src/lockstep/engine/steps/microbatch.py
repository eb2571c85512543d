"""A packed row on the device with what of it is scored: the unit of a forward and a backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lockstep.batching.packed_batch import PackedBatch, ScoredRow, scored_row
from lockstep.engine.parallel import groups
from lockstep.engine.parallel.device import CUDA, device
from lockstep.engine.rows.packed_row import BLOCK, PackedRow, packed_row, padded_length, padding_row
from lockstep.engine.state import TrainerState
from lockstep.errors import DataError

PADDING = -1
"""Row number of a micro-batch that only keeps a rank in step with the others."""


_NONE = np.zeros(0, np.int64)


NOTHING = ScoredRow(_NONE, _NONE, _NONE, _NONE * 1.0, _NONE * 1.0, _NONE, _NONE, _NONE * 1.0, _NONE * 1.0, ())
"""The scored tokens of a padding row: none."""


@dataclass(frozen=True)
class MicroBatch:
    """A row on the device, what of it is scored, and its routed experts if they are replayed.

    number: of the row in its batch, or PADDING.
    """

    row: PackedRow
    scored: ScoredRow
    number: int


def prepare(trainer: TrainerState, batch: PackedBatch, rows: Sequence[int]) -> list[MicroBatch]:
    """This data-parallel rank's rows, as many on every rank (padding rows fill up)."""
    replicas = groups.data().size()
    rank = groups.data().rank()
    own = list(rows[rank::replicas])
    own += [PADDING] * (-(-len(rows) // replicas) - len(own))
    return [_micro_batch(trainer, batch, number) for number in own]


def _unit(trainer: TrainerState) -> int:
    """Rows are cut to a multiple of this: shards of a row, and on GPU attention's blocks."""
    parts = trainer.parallel.tensor if trainer.parallel.sequence_parallel or trainer.config.is_moe else 1
    parts *= trainer.parallel.context
    return BLOCK * parts if CUDA else parts


def _micro_batch(trainer: TrainerState, batch: PackedBatch, number: int) -> MicroBatch:
    if number == PADDING:
        nothing = replace(NOTHING, top_PC=None if batch.top_PC is None else batch.top_PC[:0])
        return MicroBatch(padding_row(batch, padded_length(0, _unit(trainer)), device()), nothing, PADDING)
    scored = scored_row(batch, number)
    if len(scored.predictor_N) and scored.predictor_N.min() < 0:
        raise DataError(
            f"row {number}: a scored token has no token before it; the first token of a sequence cannot be trained"
        )
    return MicroBatch(packed_row(batch, number, device(), _unit(trainer)), scored, number)
