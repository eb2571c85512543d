"""Hugging Face's numbers for a batch, and how far a live trainer is from them.

The loss is a sum of slope times log-probability over the scored tokens, of single sequences in
Hugging Face and of packed rows in the engine. Weights get one SGD update with weight decay.
Adapters are compared with the same adapters merged into Hugging Face's weights: with W' = W + s B A,
dB = s dW' A^T and dA = s B^T dW'.

Shapes: S tokens, H width of a module, V vocabulary, P scored tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.batching.packed_batch import PackedBatch
from lockstep.engine.optim.optimizer import OptimizerStep
from lockstep.engine.state import TrainerState
from lockstep.validate.figures import Figure, figure
from lockstep.validate.reference.hugging_face import (
    disk_names,
    engine_modules,
    hugging_face,
    hugging_face_modules,
    recorded,
)
from lockstep.validate.reference.passes import FLOOR, compare_tensors, run_passes
from lockstep.validate.tolerances import limit_of

RATE, DECAY = 1e-2, 0.1
"""Of the one update."""
ADAPTER_RANK, ADAPTER_ALPHA = 3, 5.0


@dataclass(frozen=True)
class Reference:
    """Hugging Face's numbers.

    weights, gradients: by the names on disk, or an adapter's names.
    logits: `[S, V]` for each sequence. modules: outputs by module, one for each sequence.
    """

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    logits: list[Tensor]
    modules: Mapping[str, list[Tensor]]
    loss: float


def slopes(batch: PackedBatch, seed: int) -> np.ndarray:
    """float32 `[P]`: random, of mean square 1 / P^2."""
    pairs = len(batch.scored_index_P)
    return (np.random.default_rng(seed).normal(size=pairs) / pairs).astype(np.float32)


def weight_reference(
    folder: Path, batch: PackedBatch, slope_P: np.ndarray, load: Callable[[Path], Any] = hugging_face
) -> Reference:
    """All weights and their gradients on the CPU, in the precision of what `load` gives."""
    model = load(folder)
    with recorded(hugging_face_modules(model)) as modules:
        loss, logits = _loss_of(model, batch, slope_P)
    loss.backward()
    named = dict(model.named_parameters())
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in named.items()}
    weights = {name: p.detach() for name, p in named.items()}
    return Reference(disk_names(weights), disk_names(gradients), logits, modules, float(loss.detach()))


def adapter_reference(
    folder: Path, batch: PackedBatch, slope_P: np.ndarray, adapters: Mapping[str, Tensor], scale: float
) -> Reference:
    """The adapters' gradients, from Hugging Face's weights with the adapters merged into them."""
    model = hugging_face(folder)
    memory = dict(model.named_parameters())
    with torch.no_grad():
        for module, view in adapted_weights(memory, adapters):
            view.add_(adapters[f"{module}.lora_B"] @ adapters[f"{module}.lora_A"], alpha=scale)
    with recorded(hugging_face_modules(model)) as modules:
        loss, logits = _loss_of(model, batch, slope_P)
    loss.backward()
    slopes_of_weights = {name: p.grad for name, p in memory.items()}
    gradients: dict[str, Tensor] = {}
    for module, slope in adapted_weights(slopes_of_weights, adapters):
        gradients[f"{module}.lora_B"] = scale * slope @ adapters[f"{module}.lora_A"].T
        gradients[f"{module}.lora_A"] = scale * adapters[f"{module}.lora_B"].T @ slope
    return Reference(dict(adapters), gradients, logits, modules, float(loss.detach()))


def _loss_of(model: Any, batch: PackedBatch, slope_P: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """(loss, logits of every unpacked sequence)."""
    loss, logits, first = torch.zeros(()), [], 0
    for q in range(len(batch.leaf_Q)):
        row, path = int(batch.row_Q[q]), batch.path_index(q)
        ids = torch.from_numpy(batch.tokens_RS[row, path].astype(np.int64))
        logits_SV = model(ids[None]).logits[0]
        logits.append(logits_SV.detach())
        scored = batch.scored_index_P[batch.scored_offsets_Q[q] : batch.scored_offsets_Q[q + 1]]
        position = np.searchsorted(path, scored)
        temperature = torch.from_numpy(batch.temperatures_RS[row, scored])
        log_p = (logits_SV[position - 1] / temperature[:, None]).log_softmax(-1)
        chosen = log_p[torch.arange(len(position)), ids[position]]
        loss = loss + (chosen * torch.from_numpy(slope_P[first : first + len(position)])).sum()
        first += len(position)
    return loss, logits


def adapted_weights(memory: Mapping[str, Any], adapters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(canonical module, the matrix it adapts: a view of transformers' tensor, stacked experts
    included).
    """
    matrices = []
    for name in adapters:
        if not name.endswith(".lora_A"):
            continue
        module = name.removesuffix(".lora_A")
        if f"{module}.weight" in memory:
            matrices.append((module, memory[f"{module}.weight"]))
            continue
        base, expert, kind = module.rsplit(".", 2)
        if kind in ("down_proj", "gate_up_proj"):
            matrices.append((module, memory[f"{base}.{kind}"][int(expert)]))
        else:
            gate, up = memory[f"{base}.gate_up_proj"][int(expert)].chunk(2)
            matrices.append((module, gate if kind == "gate_proj" else up))
    return matrices


def random_adapters(trainer: TrainerState, seed: int, size: float = 0.05) -> dict[str, Tensor]:
    """Values for every adapter matrix of the model, by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) * size for n, shape in sorted(trainer.shapes.items())}


def measure_parity(
    trainer: TrainerState, batch: PackedBatch, slope_P: np.ndarray, reference: Reference, precision: str = "float32"
) -> tuple[list[Figure], dict[str, float]]:
    """(figures, largest relative difference of each module's outputs in the order they run).

    Collective over one rank that holds the whole model. The trainer's weights get one update.
    """
    with recorded(engine_modules(trainer.model)) as modules:
        loss, logits = run_passes(trainer, batch, slope_P)
    profile, outputs = _compare_modules(batch, modules, reference.modules)
    figures = [outputs, _compare_logits(batch, logits, reference.logits)]
    off = abs(loss - reference.loss) / max(1.0, abs(reference.loss))
    figures.append(figure("loss", [off], limit=limit_of("loss", precision)))
    norm = trainer.optimizer.reduce()
    gradients = dict(reference.gradients)
    total = sum(float(gradients[name].double().square().sum()) for name in trainer.shapes) ** 0.5
    figures.append(figure("gradient norm", [abs(norm - total) / total], limit=limit_of("gradient norm", precision)))
    largest = max(float(gradients[name].abs().max()) for name in trainer.shapes)
    differences = compare_tensors(trainer, "gradient", gradients, FLOOR * largest)
    figures.append(_of_tensors("gradients", differences, precision))
    trainer.optimizer.step(OptimizerStep(RATE, weight_decay=DECAY, max_norm=None, kind="sgd"), norm)
    differences = compare_tensors(trainer, "weight", _updated(trainer, reference), 0.0)
    figures.append(_of_tensors("weights after a step", differences, precision))
    return figures, profile


def _of_tensors(name: str, differences: Mapping[str, float], precision: str) -> Figure:
    return figure(name, list(differences.values()), list(differences), limit_of(name, precision))


def _updated(trainer: TrainerState, reference: Reference) -> dict[str, Tensor]:
    """Weights after one SGD update, with decay on matrices only: vectors, convolutions and embedding
    rows keep their scale.
    """
    updated = {}
    for name in trainer.shapes:
        weight, gradient = reference.weights[name].float(), reference.gradients[name]
        adapter = name.endswith((".lora_A", ".lora_B"))
        tied = trainer.config.tied and name.endswith("lm_head.weight")
        fixed = weight.dim() == 1 or "conv1d" in name or "embed_tokens" in name or tied
        decay = 0.0 if fixed and not adapter else DECAY
        updated[name] = weight - RATE * (gradient + decay * weight)
    return updated


def _compare_logits(batch: PackedBatch, logits: Mapping[int, Tensor], expected: list[Tensor]) -> Figure:
    values, places = [], []
    for q, wanted in enumerate(expected):
        rows = logits[int(batch.row_Q[q])][torch.from_numpy(batch.path_index(q))].cpu()[:, : wanted.shape[1]]
        difference_S = (rows - wanted).abs().amax(1) / wanted.abs().max()
        values += difference_S.tolist()
        places += [f"{batch.sequence_ids[q]}, token {token}" for token in range(len(difference_S))]
    return figure("logits", values, places, limit_of("logits", "float32"))


def _compare_modules(
    batch: PackedBatch, modules: Mapping[str, list[Tensor]], expected: Mapping[str, list[Tensor]]
) -> tuple[dict[str, float], Figure]:
    """(largest difference by module, figure over all modules and tokens), relative to the module's
    largest output.
    """
    profile: dict[str, float] = {}
    values, places = [], []
    for name, outputs in expected.items():
        scale = max(float(output.abs().max()) for output in outputs)
        profile[name] = 0.0
        if len(modules[name]) <= int(batch.row_Q.max()):  # it did not run for every row
            profile[name] = float("inf")
            values, places = [*values, float("inf")], [*places, f"{name} did not run"]
            continue
        for q, wanted_SH in enumerate(outputs):
            rows = modules[name][int(batch.row_Q[q])][torch.from_numpy(batch.path_index(q))]
            difference_S = (rows - wanted_SH).abs().amax(1) / scale
            worse = float(difference_S.max())
            profile[name] = worse if not worse <= profile[name] else profile[name]
            values += difference_S.tolist()
            places += [f"{name}, {batch.sequence_ids[q]}, token {token}" for token in range(len(difference_S))]
    return profile, figure("module outputs", values, places, limit_of("module outputs", "float32"))


def first_difference(profile: Mapping[str, float], limit: float) -> str:
    """The first module, in the order they run, whose output is beyond the limit; empty: none is."""
    return next((name for name, difference in profile.items() if not difference <= limit), "")
