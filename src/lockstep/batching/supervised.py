"""Which rows a supervised step takes, and the packed batch of them.

Shape suffix: Q sequences.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lockstep.batching.pack import MOST_ROW_LENGTH, pack, packing_metrics
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.batching.prepare import Prepared

if TYPE_CHECKING:
    from lockstep.config.sft import SFTConfig


def steps_of(rows: int, batch_size: int, epochs: float) -> int:
    """Steps of so many epochs; the last step may have fewer rows."""
    return math.ceil(rows * epochs / batch_size)


def drawn_rows(rows: int, batch_size: int, epochs: float, seed: int, step: int) -> list[int]:
    """The rows of a step (the first is 1), from epochs of a shuffled list. They depend on these
    numbers alone, so a run that resumes inside an epoch keeps the order.
    """
    last = min(step * batch_size, math.ceil(rows * epochs))
    orders: dict[int, list[int]] = {}
    drawn = []
    for position in range((step - 1) * batch_size, last):
        epoch, offset = divmod(position, rows)
        if epoch not in orders:
            orders[epoch] = random.Random(f"{seed}/{epoch}").sample(range(rows), rows)
        drawn.append(orders[epoch][offset])
    return drawn


def prepare_supervised(
    rows: Sequence[Sequence[TokenSequence]],
    *,
    step: int,
    config: SFTConfig,
    data: int = 1,
    row_limit: int = MOST_ROW_LENGTH,
) -> Prepared:
    """Pack the rows of step `step`. Every token with loss counts the same.

    Raises DataError for fewer sequences than minibatches.
    """
    sequences = [sequence for row in rows for sequence in row]
    ones_Q = np.ones(len(sequences))
    batch = pack(
        sequences,
        ones_Q,
        ones_Q,
        row_length=config.row_length,
        seed=config.seed + step,
        share_prefixes=config.share_prefixes,
        minibatches=config.minibatches,
        data=data,
        row_limit=row_limit,
    )
    return Prepared(batch, {"chats": float(len(rows))} | packing_metrics(batch), sequences, sequences)
