"""Stage packing_invariance: rows in which sequences share tokens, against one sequence a row.

Shapes: R rows, S row length, T tokens of all sequences.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lockstep.batching.packed_batch import PackedBatch
from lockstep.engine.state import TrainerState
from lockstep.engine.steps.score import score
from lockstep.validate.figures import Figure, Outcome, figure, judged
from lockstep.validate.reference.batches import batch_of, tree_sequences
from lockstep.validate.reference.parity import slopes
from lockstep.validate.reference.passes import FLOOR, compare_tensors, named_gradients, run_passes
from lockstep.validate.reference.trainers import start_rank, weights_trainer
from lockstep.validate.request import Request
from lockstep.validate.tolerances import limit_of

_LEAVES = 9


def problem(seed: int) -> tuple[PackedBatch, PackedBatch, np.ndarray]:
    """(packed as trees, one sequence a row, a slope for every scored token, in both's order)."""
    sequences = tree_sequences(np.random.default_rng(seed), leaves=_LEAVES)
    longest = max(map(len, sequences))
    trees = batch_of(sequences, np.random.default_rng(seed), row_length=4 * longest)
    plain = batch_of(sequences, np.random.default_rng(seed), share=False, row_length=longest)
    return trees, plain, slopes(trees, seed)


def run(request: Request) -> Outcome:
    """See the module."""
    start_rank(request.seed)
    trees, plain, slope_P = problem(request.seed)
    trainer = weights_trainer(request.base_model)
    request.say("single sequences")
    expected = reference(trainer, plain, slope_P)
    request.say("packed rows")
    figures = measure(trainer, trees, slope_P, expected)
    used, single = int((trees.nodes_RS >= 0).sum()), int((plain.nodes_RS >= 0).sum())
    return judged(figures, [f"{used} computed tokens in {trees.rows} rows stand for {single} of single sequences"])


def reference(trainer: TrainerState, plain: PackedBatch, slope_P: np.ndarray) -> tuple[np.ndarray, dict[str, Tensor]]:
    """(log-probabilities `[T]`, gradients by name) of one sequence a row."""
    scores_T = of_sequences(plain, score(trainer, plain, _silent))
    run_passes(trainer, plain, slope_P)
    trainer.optimizer.reduce()
    return scores_T, named_gradients(trainer)


def measure(
    trainer: TrainerState, trees: PackedBatch, slope_P: np.ndarray, expected: tuple[np.ndarray, dict[str, Tensor]]
) -> list[Figure]:
    """Figures of the packed rows against single sequences."""
    expected_T, gradients = expected
    differences_T = np.abs(of_sequences(trees, score(trainer, trees, _silent)) - expected_T)
    places = [
        f"{trees.sequence_ids[q]}, token {token}"
        for q in range(len(trees.leaf_Q))
        for token in range(1, len(trees.path_index(q)))
    ]
    name = "packed log-probabilities"
    figures = [figure(name, differences_T.tolist(), places, limit_of(name, "float32"), unit="nats")]
    run_passes(trainer, trees, slope_P)
    trainer.optimizer.reduce()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    differences = compare_tensors(trainer, "gradient", gradients, FLOOR * largest)
    name = "packed gradients"
    return [*figures, figure(name, list(differences.values()), list(differences), limit_of(name, "float32"))]


def of_sequences(batch: PackedBatch, values_RS: np.ndarray) -> np.ndarray:
    """float `[T]`: the values of each sequence's tokens after its first."""
    return np.concatenate([values_RS[batch.row_Q[q], batch.path_index(q)[1:]] for q in range(len(batch.leaf_Q))])


def _silent(_event: object) -> None:
    """Nobody waits for a phase here."""
