"""Stage hf_parity: module outputs, logits, loss, gradients and one update against Hugging Face.

All weights first, then adapters on the default targets. Where a figure is outside its limit, the
rounding of Hugging Face's own fp32 on this problem is measured as its distance from our fp64 run.
A figure may then be five times as far outside as that rounding is, and never thirty times. On a GPU,
whose kernels have no fp64, the limits stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from lockstep.batching.packed_batch import PackedBatch
from lockstep.engine.parallel.device import CUDA
from lockstep.models.discovery import inspect_architecture
from lockstep.validate.figures import Figure, Outcome, judged
from lockstep.validate.reference.batches import batch_of, tree_sequences
from lockstep.validate.reference.parity import (
    ADAPTER_ALPHA,
    ADAPTER_RANK,
    Reference,
    adapter_reference,
    first_difference,
    measure_parity,
    slopes,
    weight_reference,
)
from lockstep.validate.reference.trainers import adapter_trainer, start_rank, weights_trainer
from lockstep.validate.request import Request
from lockstep.validate.tolerances import limit_of

_MOST_ROOM = 30.0
_NOISE_ROOM = 5.0


def problem(seed: int, temperature: float = 0.7) -> tuple[PackedBatch, np.ndarray]:
    """(random trees packed into rows, a slope for every scored token)."""
    rng = np.random.default_rng(seed)
    batch = batch_of(tree_sequences(rng, temperature=temperature), rng, row_length=40)
    return batch, slopes(batch, seed)


def run(request: Request) -> Outcome:
    """See the module."""
    start_rank(request.seed)
    folder, seed = request.base_model, request.seed
    batch, slope_P = problem(seed)
    request.say("Hugging Face: forward and backward pass")
    reference = weight_reference(folder, batch, slope_P)
    request.say("trainer: all weights")
    figures, profile = measured_weights(folder, batch, slope_P, reference)
    request.say("trainer: adapters")
    figures += measured_adapters(folder, batch, slope_P, seed)
    kinds = ", ".join(family.key for family in inspect_architecture(str(folder)).layer_families)
    notes = [f"kinds of layers: {kinds}", f"{batch.tokens_RS.size} places of {batch.rows} rows"]
    first = first_difference(profile, limit_of("module outputs", "float32"))
    if first:
        notes.append(f"the first module that differs: {first}")
    return judged(figures, notes, {"parity per module": profile})


def measured_weights(
    folder: Path, batch: PackedBatch, slope_P: np.ndarray, reference: Reference
) -> tuple[list[Figure], dict[str, float]]:
    """Figures of a trainer of all weights, and its profile by module."""
    figures, profile = measure_parity(weights_trainer(folder), batch, slope_P, reference)
    if not CUDA and not all(one_figure.ok for one_figure in figures):
        noise, _ = measure_parity(weights_trainer(folder, "float64"), batch, slope_P, reference)
        figures = with_room(figures, noise)
    return figures, profile


def measured_adapters(folder: Path, batch: PackedBatch, slope_P: np.ndarray, seed: int) -> list[Figure]:
    """Figures of a trainer of adapters, named as such."""
    trainer, adapters = adapter_trainer(folder, seed)
    reference = adapter_reference(folder, batch, slope_P, adapters, ADAPTER_ALPHA / ADAPTER_RANK)
    figures, _ = measure_parity(trainer, batch, slope_P, reference)
    if not CUDA and not all(one_figure.ok for one_figure in figures):
        wide, _ = adapter_trainer(folder, seed, "float64")
        noise, _ = measure_parity(wide, batch, slope_P, reference)
        figures = with_room(figures, noise)
    return [replace(one_figure, name=f"adapters: {one_figure.name}") for one_figure in figures]


def with_room(figures: list[Figure], noise: list[Figure]) -> list[Figure]:
    """The figures with limits for a problem on which fp32 rounds by `noise`.

    The figure that rounding amplifies most counts for all: any one of them may cancel by chance.
    """
    amplified = max(rounding.value / rounding.limit for rounding in noise if rounding.limit)
    room = min(max(1.0, _NOISE_ROOM * amplified), _MOST_ROOM)
    return [one_figure.loosened(room) for one_figure in figures]
