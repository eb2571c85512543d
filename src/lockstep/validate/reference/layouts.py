"""A single rank's numbers, and ranks of other layouts that are compared with them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lockstep.config.megatron import Parallel
from lockstep.engine.parallel.device import CUDA
from lockstep.engine.steps.score import score
from lockstep.errors import ConfigError, TrainerError
from lockstep.models.config import ModelConfig
from lockstep.models.parallel_sizes import check_parallel
from lockstep.process.child import child_env, spawn
from lockstep.validate.figures import Figure, count, figure
from lockstep.validate.reference.layout_problem import problem, silent, stepped
from lockstep.validate.reference.passes import named_gradients, named_masters, run_passes
from lockstep.validate.reference.trainers import adapter_trainer, weights_trainer
from lockstep.validate.request import Request
from lockstep.validate.tolerances import limit_of

TWO_RANKS: Mapping[str, dict[str, Any]] = {
    "TP 2": {"tensor": 2, "sequence": False},
    "TP 2, SP": {"tensor": 2, "sequence": True},
    "PP 2": {"pipeline": 2},
    "DP 2": {"data": 2},
    "CP 2": {"context": 2},
    "EP 2": {"expert": 2, "data": 2},
    "TP 2, SP, EP 2": {"tensor": 2, "sequence": True, "expert": 2},
    "TP 2, SP, ETP 2": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "CP 2, EP 2": {"context": 2, "expert": 2},
}
"""Layouts of two processes."""


@dataclass(frozen=True)
class Question:
    """A layout, and a fault that is planted in its ranks."""

    name: str
    parallel: dict[str, Any]
    fault: str | None = None


def layouts_for(config: ModelConfig, asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The layouts to try: those of two ranks that divide the model, or the one asked for.

    Raises ConfigError when the model can't be split as asked.
    """
    if asked:
        check_parallel(config, Parallel(**asked))
        return {", ".join(f"{name} {size}" for name, size in asked.items()): dict(asked)}
    fitting = {}
    for name, sizes in TWO_RANKS.items():
        try:
            check_parallel(config, Parallel(**sizes))
        except ConfigError:
            continue
        fitting[name] = sizes
    return fitting


def too_few_gpus(processes: int) -> str | None:
    """Why so many ranks can't run here; None: they can."""
    if not CUDA or (has := torch.cuda.device_count()) >= processes:
        return None
    return f"a layout of {processes} ranks needs as many GPUs, and this machine has {has}"


def write_oracle(request: Request) -> tuple[Path, dict[str, float]]:
    """(file with scores, gradients and adapters after a step; the step's metrics) of one rank."""
    batch, slope_P = problem(request.seed)
    trainer = weights_trainer(request.base_model)
    tensors = {"scores": torch.from_numpy(score(trainer, batch, silent)).nan_to_num()}
    run_passes(trainer, batch, slope_P)
    trainer.optimizer.reduce()
    tensors |= {f"gradient/{name}": gradient for name, gradient in named_gradients(trainer).items()}
    adapting, _ = adapter_trainer(request.base_model, request.seed)
    metrics = stepped(adapting, batch, request.seed)
    tensors |= {f"after/{name}": master for name, master in named_masters(adapting).items()}
    path = request.folder / "oracle.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path, metrics


def answers_of(
    request: Request, oracle: tuple[Path, dict[str, float]], questions: Sequence[Question], deadline_s: float
) -> dict[str, list[dict[str, Any]]]:
    """What every rank measured, by question; all questions run in one set of processes.

    Raises TrainerError, with the log's last lines, when a rank dies or the deadline is missed.
    """
    processes = max(Parallel(**question.parallel).processes for question in questions)
    asked, answered = request.folder / "asked.json", request.folder / "answered.json"
    answered.unlink(missing_ok=True)
    work = {"folder": str(request.base_model), "seed": request.seed, "oracle": str(oracle[0]), "metrics": oracle[1]}
    asked.write_text(json.dumps(work | {"questions": [vars(question) for question in questions]}), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "lockstep.engine.parallel.launch", str(processes), "-m",
               "lockstep.validate.ranks", str(asked), str(answered)]  # fmt: skip
    env = child_env({"OMP_NUM_THREADS": "1"} | {k: v for k, v in os.environ.items() if k == "CUDA_VISIBLE_DEVICES"})
    child = spawn(command, env, request.folder / "logs" / "ranks.log", "the ranks")
    try:
        child.wait(deadline_s)
    except TimeoutError as error:
        raise TrainerError(str(error)) from None
    finally:
        child.kill()
    if not answered.is_file():
        raise TrainerError(f"the ranks ended without an answer:\n{child.log_tail(20)}")
    return json.loads(answered.read_text(encoding="utf-8"))


def figures_of(name: str, answers: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Figures of one question over all of its ranks."""
    refused = [answer["refused"] for answer in answers if "refused" in answer]
    if refused:
        return [count(f"{name}: refusals", len(refused), where=refused[0])]
    gradients: dict[str, float] = {}
    moves: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    for answer in answers:
        for tensor, off in answer["gradients"].items():
            gradients[tensor] = _larger(gradients.get(tensor, 0.0), off)
        for tensor, (difference, move) in answer["moved"].items():
            sums = moves.setdefault(tensor, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + difference, sums[1] + move
        for metric, off in answer["metrics"].items():
            metrics[metric] = _larger(metrics.get(metric, 0.0), off)
    scores = [max(values) for values in zip(*(answer["scores"] for answer in answers), strict=True)]
    rows = [f"row {number}" for number in range(len(scores))]
    shares = {tensor: difference / max(move, 1e-12) for tensor, (difference, move) in moves.items()}
    return [
        _figure(name, "layout log-probabilities", scores, rows),
        _figure(name, "layout gradients", list(gradients.values()), list(gradients)),
        _figure(name, "layout update", list(shares.values()), list(shares)),
        _figure(name, "layout metrics", list(metrics.values()), list(metrics)),
    ]


def _larger(first: float, second: float) -> float:
    """The larger of two differences; one that is not a number stays in sight."""
    return first if second <= first else second


def _figure(layout: str, name: str, values: Sequence[float], places: Sequence[str]) -> Figure:
    return figure(f"{layout}: {name.removeprefix('layout ')}", values, places, limit_of(name, "float32"))
