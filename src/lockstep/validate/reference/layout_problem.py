"""A batch that runs at all sizes of two ranks, and the comparable metrics of a step on it."""

from __future__ import annotations

import numpy as np

from lockstep.batching.packed_batch import PackedBatch
from lockstep.config.train import TrainConfig
from lockstep.engine.state import TrainerState
from lockstep.engine.steps.train_step import train_step
from lockstep.validate.reference.batches import batch_of, tree_sequences, with_random_experts
from lockstep.validate.reference.parity import slopes

_UNEQUAL = ("seconds_", "tokens_per_second", "peak_memory_bytes", "compil")
"""Metrics of time and memory."""
CONFIG = TrainConfig(minibatches=2, old_logprobs="trainer", max_mismatch=None, learning_rate=1e-3)


def problem(seed: int) -> tuple[PackedBatch, np.ndarray]:
    """A batch for two data-parallel ranks and two minibatches, which runs at all sizes."""
    rng = np.random.default_rng(seed)
    batch = batch_of(tree_sequences(rng, leaves=9), rng, minibatches=2, data=2, row_length=40)
    return batch, slopes(batch, seed)


def silent(_event: object) -> None:
    """Nobody waits for a phase here."""


def stepped(trainer: TrainerState, batch: PackedBatch, seed: int) -> dict[str, float]:
    """The comparable metrics of a whole training step on replayed experts."""
    metrics = train_step(trainer, with_random_experts(batch, trainer.config, seed), CONFIG, None, silent)
    return {name: value for name, value in metrics.items() if not name.startswith(_UNEQUAL)}
