"""A rank's forward and backward passes against Hugging Face on the same weights, at whatever parallel sizes are up.

Run as a program it goes through a list of checks in one set of processes and writes what it measured; the tests judge the figures.
Shapes: S row tokens, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.top_logprobs import TOP
from lockstep.config.megatron import Parallel
from lockstep.config.train import TrainConfig
from lockstep.engine.optim.optimizer import OptimizerStep
from lockstep.engine.optim.trainable import assign
from lockstep.engine.parallel import device  # first: prepares torch for Megatron
from lockstep.engine.state import TrainerState, load_step, open_trainer, save_step
from lockstep.engine.steps.microbatch import prepare
from lockstep.engine.steps.score import score, score_and_rank
from lockstep.engine.steps.train_step import check_records, expert_choices_that_differ, train_step
from lockstep.errors import DataError, TrainerError
from lockstep.models.registry import get_model_support_handler
from lockstep.trainer.protocol import EngineConfig, LoraSettings
from lockstep.validate.reference.batches import batch_of, tree_sequences, with_random_experts
from lockstep.validate.reference.hugging_face import hugging_face, hugging_face_fp64
from lockstep.validate.reference.parity import adapter_reference, weight_reference
from lockstep.validate.reference.passes import FLOOR, compare_tensors, run_passes

Dtype = Literal["float32", "float64"]

LIMITS = {"logits": 2e-6, "loss": 1e-6, "gradient": 2e-5, "weights": 1e-6, "norm": 1e-5}
"""Relative, but for `weights`: fp32 against fp32. Logits count from the largest logit, gradients from each tensor's largest entry."""


def beyond(result: dict[str, Any]) -> bool:
    """Whether any rank has a figure outside its limit; then the noise of fp32 on this problem must be known."""
    flag = torch.tensor(float(any(not result[name] <= limit for name, limit in LIMITS.items() if name in result)))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def reference(
    folder: Path, batch: PackedBatch, slope_P: np.ndarray, load: Callable[[Path], Any] = hugging_face
) -> tuple[Any, ...]:
    """(weights, gradients, logits per sequence, loss) of `sum over pairs slope * logprob` on the unpacked sequences, by disk name."""
    theirs = weight_reference(folder, batch, slope_P, load)
    return theirs.weights, theirs.gradients, theirs.logits, theirs.loss


def largest_difference(
    trainer: TrainerState, kind: str, expected: dict[str, Tensor], floor: float
) -> tuple[float, str]:
    """Largest difference of this rank's slices of gradients or masters, and where."""
    differences = compare_tensors(trainer, kind, expected, floor)
    where = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]), default="")
    return differences.get(where, 0.0), where


def problem(
    parallel: dict[str, Any], seed: int, temperature: float, spread: int = 0
) -> tuple[Parallel, PackedBatch, np.ndarray]:
    """Sizes, a batch of random trees distributed over `spread` data-parallel ranks (0: as many as there are), a slope per scored token."""
    rng, sizes = np.random.default_rng(seed), Parallel(**parallel)
    batch = batch_of(tree_sequences(rng, temperature=temperature), rng, data=spread or sizes.data, row_length=40)
    while spread == 1 and batch.rows % 2 == 0:  # an odd number of rows for two ranks: one of them runs a row of padding
        batch = batch_of(tree_sequences(rng, temperature=temperature), rng, row_length=40)
    pairs = len(batch.scored_index_P)
    return sizes, batch, (rng.normal(size=pairs) / pairs).astype(np.float32)


def computed_once(compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, on every rank: a reference costs as much as what it judges."""
    results = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(results, src=0)
    return results[0]


@lru_cache(maxsize=4)
def known_reference(folder: Path, seed: int, data: int, spread: int, load: Callable[[Path], Any] = hugging_face) -> Any:
    """`reference` of the problem with these numbers; checks of one model at several sizes share it."""
    _, batch, slope_P = problem({"data": data}, seed, 0.7, spread)
    return computed_once(lambda: reference(folder, batch, slope_P, load))


@lru_cache(maxsize=4)
def known_merged_reference(folder: Path, seed: int, data: int, shapes: tuple[Any, ...], scale: float) -> Any:
    """The adapters, their gradients and the loss of the problem with these numbers."""
    _, batch, slope_P = problem({"data": data}, seed, 1.0)
    generator = torch.Generator().manual_seed(seed)
    adapters = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes}

    def merged() -> tuple[Any, float]:
        theirs = adapter_reference(folder, batch, slope_P, adapters, scale)
        return theirs.gradients, theirs.loss

    return adapters, *computed_once(merged)


def check(
    folder: Path,
    parallel: dict[str, Any],
    seed: int,
    rate: float = 1e-2,
    recompute: bool = False,
    stages: Any = None,
    spread: int = 0,
) -> dict[str, Any]:
    """Logits, loss, all gradients and one SGD update of a random batch of trees."""
    sizes, batch, slope_P = problem(parallel, seed, 0.7, spread)
    weights, gradients, logits, loss = known_reference(folder, seed, sizes.data, spread)
    device.rebuild_groups(sizes, seed=0)
    session_settings = {"recompute": recompute, "stages": stages}
    result, trainer, norm = measure(
        folder, sizes, batch, slope_P, (gradients, logits, loss), "float32", **session_settings
    )
    trainer.optimizer.step(OptimizerStep(rate, max_norm=None, kind="sgd"), norm)
    updated = {name: weights[name] - rate * gradients[name] for name in trainer.shapes}
    result["weights"], result["weights_at"] = largest_difference(trainer, "weight", updated, 0.0)
    if beyond(result):
        noise, trainer, norm = measure(folder, sizes, batch, slope_P, (gradients, logits, loss), "float64")
        trainer.optimizer.step(OptimizerStep(rate, max_norm=None, kind="sgd"), norm)
        noise["weights"], _ = largest_difference(trainer, "weight", updated, 0.0)
        result["noise"] = {name: value for name, value in noise.items() if isinstance(value, float)}
    return result


def check_exact(folder: Path, parallel: dict[str, Any], seed: int) -> dict[str, Any]:
    """Loss, logits and gradients in fp64 against Hugging Face in fp64 throughout: the same function, down to its rounding."""
    sizes, batch, slope_P = problem(parallel, seed, 0.7)
    device.rebuild_groups(sizes, seed=0)
    expected = known_reference(folder, seed, sizes.data, 0, hugging_face_fp64)[1:]
    return measure(folder, sizes, batch, slope_P, expected, "float64")[0]


def measure(
    folder: Path,
    sizes: Parallel,
    batch: PackedBatch,
    slope_P: np.ndarray,
    expected: Any,
    dtype: Dtype,
    **settings: Any,
) -> tuple[dict[str, Any], TrainerState, float]:
    """Distances of loss, logits, gradients and their norm from the expected ones, computed in `dtype`."""
    gradients, logits, loss = expected
    trainer = open_trainer(EngineConfig(str(folder), sizes, dtype=dtype, **settings))
    found_loss, found_logits = run_passes(trainer, batch, slope_P)
    result: dict[str, Any] = {"loss": abs(found_loss - loss) / max(1.0, abs(loss)), "logits": 0.0}
    if trainer.model.post_process:
        width = trainer.model.head_weight().shape[0]
        start = sizes_rank(sizes) * width
        for q, wanted in enumerate(logits):
            row = int(batch.row_Q[q])
            if row in found_logits:
                stop = min(start + width, wanted.shape[1])
                ours = found_logits[row][torch.from_numpy(batch.path_index(q))][:, : stop - start]
                off = float((ours - wanted[:, start:stop]).abs().max() / wanted.abs().max())
                result["logits"] = max(result["logits"], off)
    norm = trainer.optimizer.reduce()
    largest = max(float(gradients[name].abs().max()) for name in trainer.shapes)
    total = sum(float(gradients[name].double().square().sum()) for name in trainer.shapes)
    result["norm"] = abs(norm - total**0.5) / total**0.5
    result["gradient"], result["gradient_at"] = largest_difference(trainer, "gradient", gradients, FLOOR * largest)
    return result, trainer, norm


def sizes_rank(_sizes: Parallel) -> int:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank()


def largest_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    merged = dict(results[0])
    for result in results[1:]:
        for key, value in result.items():
            if isinstance(value, dict):
                merged[key] = largest_of([merged[key], value])
            elif isinstance(value, float) and not value <= merged[key]:
                merged[key] = value
                if f"{key}_at" in result:
                    merged[f"{key}_at"] = result[f"{key}_at"]
    return merged


def main() -> None:
    """`parity.py CHECKS.json OUT.json`, CHECKS a list of {"name", "folder", "parallel", "seed", ...}."""
    torch.set_num_threads(1)
    checks = json.loads(Path(sys.argv[1]).read_text())
    world = int(os.environ["WORLD_SIZE"])
    device.start(Parallel(data=world), seed=0, timeout_s=100)
    measured = {}
    for item in checks:
        name, kind = item.pop("name"), item.pop("kind", "check")
        item["folder"] = Path(item["folder"])
        case = KINDS[kind](**item)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, case)
        measured[name] = largest_of(everyone)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(measured, indent=1))
    dist.destroy_process_group()


def check_lora(folder: Path, parallel: dict[str, Any], seed: int, targets: list[str] | None = None) -> dict[str, Any]:
    """Adapters on every target: their gradients and one SGD update, against the same adapters merged into Hugging Face weights.

    With W' = W + s B A, dB = s dW' A^T and dA = s B^T dW': exact, and independent of any adapter library.
    """
    sizes, batch, slope_P = problem(parallel, seed, temperature=1.0)
    device.rebuild_groups(sizes, seed=0)
    chosen = tuple(targets or get_model_support_handler(str(folder)).spec.default_target_modules)
    result = measure_lora(folder, sizes, batch, slope_P, chosen, seed, "float32")
    if beyond(result):
        noise = measure_lora(folder, sizes, batch, slope_P, chosen, seed, "float64")
        result["noise"] = {name: value for name, value in noise.items() if isinstance(value, float)}
    return result


def measure_lora(
    folder: Path,
    sizes: Parallel,
    batch: PackedBatch,
    slope_P: np.ndarray,
    targets: tuple[str, ...],
    seed: int,
    dtype: Dtype,
) -> dict[str, Any]:
    rank, alpha, rate = 3, 5.0, 1e-2
    trainer = open_trainer(EngineConfig(str(folder), sizes, lora=LoraSettings(rank, alpha, targets), dtype=dtype))
    shapes = tuple(sorted(trainer.shapes.items()))
    adapters, expected, loss = known_merged_reference(folder, seed, sizes.data, shapes, alpha / rank)
    assign(trainer.trainables, adapters)
    for bucket in trainer.optimizer.buckets:
        bucket.master.copy_(bucket.weights[bucket.low : bucket.high].detach())
    found_loss, _ = run_passes(trainer, batch, slope_P)
    norm = trainer.optimizer.reduce()
    largest = max(float(g.abs().max()) for g in expected.values())
    result: dict[str, Any] = {"loss": abs(found_loss - loss) / max(1.0, abs(loss))}
    result["gradient"], result["gradient_at"] = largest_difference(trainer, "gradient", expected, FLOOR * largest)
    trainer.optimizer.step(OptimizerStep(rate, max_norm=None, kind="sgd"), norm)
    updated = {n: adapters[n] - rate * expected[n] for n in adapters}
    result["weights"], result["weights_at"] = largest_difference(trainer, "weight", updated, 0.0)
    return result


def check_step(folder: Path, parallel: dict[str, Any], seed: int) -> dict[str, Any]:
    """Metrics of a whole training step (two updates) at these sizes and on data-parallel ranks alone: the largest relative difference
    of any that does not tell of time or memory."""
    rng = np.random.default_rng(seed)
    batch = batch_of(tree_sequences(rng, leaves=9), rng, minibatches=2, data=2, row_length=40)
    top_PC = np.argsort(rng.random((len(batch.scored_index_P), 300)), axis=1)[:, :TOP].astype(np.int32)
    top_PC[rng.random(len(top_PC)) < 0.3] = -1
    batch = replace(batch, top_PC=top_PC)
    config = TrainConfig(minibatches=2, old_logprobs="trainer", max_mismatch=None, learning_rate=1e-3)
    targets = tuple(get_model_support_handler(str(folder)).spec.default_target_modules)
    results = []
    for sizes in (Parallel(**parallel), Parallel(data=dist.get_world_size())):
        device.rebuild_groups(sizes, seed=0)
        trainer = open_trainer(EngineConfig(str(folder), sizes, lora=LoraSettings(3, 5.0, targets)))
        given = with_random_experts(batch, trainer.config, seed)
        results.append(train_step(trainer, given, config, None, lambda _event: None))
    first, theirs = results
    assert set(first) == set(theirs), set(first) ^ set(theirs)
    largest, where = 0.0, ""
    for name in first.keys() - {"tokens_per_second", "peak_memory_bytes"}:
        off = abs(first[name] - theirs[name]) / max(abs(theirs[name]), 0.05)
        if not name.startswith("seconds_") and not off <= largest:
            largest, where = off, name
    return {"metric": largest, "metric_at": where, "metrics": float(len(first))}


def check_routed_experts(folder: Path, parallel: dict[str, Any], seed: int) -> dict[str, Any]:
    """Random routed experts, scored at these sizes and with every rank on its own: the largest
    difference, and what the routed experts change at all.
    """
    rng = np.random.default_rng(seed)
    batch = batch_of(tree_sequences(rng), rng, data=2, row_length=40)
    scores, tops, chances, records = [], [], [], {}
    for sizes in (Parallel(**parallel), Parallel(data=dist.get_world_size())):
        device.rebuild_groups(sizes, seed=0)
        trainer = open_trainer(EngineConfig(str(folder), sizes))
        replay = with_random_experts(batch, trainer.config, seed)
        scored = score_and_rank(trainer, replay, lambda _event: None, 20)
        scores.append(scored["logprobs_RS"])
        tops.append(scored["top_RSC"])
        chances.append(scored["top_logprobs_RSC"])
        if len(scores) == 1:
            records = check_records_once(trainer, replay)
        else:
            records["same_choices"] = float(
                records["differ"] == expert_choices_that_differ(trainer)["expert_choices_differ"]
            )
    live = score(trainer, batch, lambda _event: None)
    return {
        "difference": float(max(np.nanmax(np.abs(a - b)) for a, b in (scores, chances))),
        "effect": float(np.nanmax(np.abs(scores[1] - live))),
        "same_top": float(np.mean(tops[0] == tops[1])),
        **records,
    }


def check_records_once(trainer: Any, replayed: Any) -> dict[str, float]:
    """Every record used once, forward only and in a training pass that recomputes its activations; and three ways to fail are seen.

    Planted: a layer that reads its neighbour's records, one that reads the token before, and one that runs twice.
    """
    slope_P = np.zeros(len(replayed.scored_index_P), np.float32)
    work = prepare(trainer, replayed, list(range(replayed.rows)))
    differences: dict[str, float] = {"differ": expert_choices_that_differ(trainer)["expert_choices_differ"]}
    for layer in trainer.model.decoder.layers:
        layer.recompute = True
    trainer.model.replayed.clear()
    run_passes(trainer, replayed, slope_P)
    check_records(trainer, work)
    differences["recomputed"] = expert_choices_that_differ(trainer)["expert_choices_differ"]
    total = trainer.model.replayed.choices[1].clone()
    dist.all_reduce(total)
    records = replayed.experts_RSLK[0, 0].size * int(
        np.isin(np.arange(replayed.tokens_RS.size), followed(replayed)).sum()
    )
    differences["counted_once"] = float(int(total) == records)
    mixture = trainer.model.decoder.layers[-1].mlp
    honest = mixture._route
    plants = {
        "layer": lambda x, row: honest(x, replace(row, experts_SLK=row.experts_SLK.roll(1, 1))),
        "token": lambda x, row: honest(x, replace(row, experts_SLK=row.experts_SLK.roll(1, 0))),
        "twice": lambda x, row: (honest(x, row), honest(x, row))[1],
    }
    for name, plant in plants.items():
        mixture._route = plant
        differences[f"caught_{name}"] = 0.0
        try:
            score(trainer, replayed, lambda _event: None)
        except TrainerError:
            differences[f"caught_{name}"] = 1.0
        mixture._route = honest
    return differences | check_records_refused(trainer, replayed)


def check_records_refused(trainer: TrainerState, replayed: Any) -> dict[str, float]:
    """Records that don't fit, at the last token, which one data-parallel rank holds: refused on every rank, at that token."""
    messages: dict[str, float] = {}
    row, place = (int(places[-1]) for places in np.nonzero(replayed.nodes_RS >= 0))
    choices_K = replayed.experts_RSLK[row, place, -1]
    for name, value in {"beyond": trainer.config.experts, "doubled": choices_K[-1]}.items():
        if name == "doubled" and len(choices_K) == 1:
            continue  # one expert alone can't be there twice
        broken = replayed.experts_RSLK.copy()
        broken[row, place, -1, 0] = value
        messages[f"caught_{name}"] = 0.0
        try:
            score(trainer, replace(replayed, experts_RSLK=broken), lambda _event: None)
        except DataError as error:
            messages[f"caught_{name}"] = float(f"row {row}, token {place}:" in str(error))
    return messages


def followed(batch: PackedBatch) -> np.ndarray:
    """Flat places of the tokens that another token follows: the only ones whose choices count."""
    rows = np.arange(batch.rows)[:, None] * batch.row_length
    return np.unique((batch.previous_RS + rows)[batch.previous_RS >= 0])


def check_resume(folder: Path, parallel: dict[str, Any], seed: int, lora: bool, place: str) -> dict[str, Any]:
    """Two AdamW steps; the state written at these sizes, read at others and written again: the same bytes. And it goes on the same way."""
    sizes, batch, slope_P = problem(parallel, seed, temperature=1.0)
    targets = tuple(get_model_support_handler(str(folder)).spec.default_target_modules)
    adapter = LoraSettings(3, 5.0, targets) if lora else None
    home = Path(place)
    files, norms = [], []
    for number, now in enumerate((sizes, Parallel(data=dist.get_world_size()), sizes)):
        device.rebuild_groups(now, seed=0)
        trainer = open_trainer(EngineConfig(str(folder), now, seed=number, lora=adapter))
        if number == 0:
            steps(trainer, batch, slope_P, 2)
        else:
            load_step(trainer, home / f"{number - 1}")
        save_step(trainer, home / f"{number}")
        files.append(contents(home / f"{number}"))
        # A batch made for two data-parallel ranks runs at all sizes.
        norms.append(steps(trainer, batch, slope_P, 1))
    return {
        "same_bytes": float(files[0] == files[1] == files[2]),
        "same_norm": float(norms[0] == norms[2]),
        "norm": abs(norms[0] - norms[1]) / norms[0],
        "files": float(len(files[0])),
    }


def steps(trainer: TrainerState, batch: PackedBatch, slope_P: np.ndarray, count: int) -> float:
    norm = 0.0
    for _ in range(count):
        run_passes(trainer, batch, slope_P)
        norm = trainer.optimizer.reduce()
        trainer.optimizer.step(OptimizerStep(1e-3), norm)
    return norm


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "check": check,
    "exact": check_exact,
    "lora": check_lora,
    "replay": check_routed_experts,
    "resume": check_resume,
    "step": check_step,
}

if __name__ == "__main__":
    main()
