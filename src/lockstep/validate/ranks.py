"""One rank of a parallel layout, measured against a single rank: `python -m
lockstep.engine.parallel.launch N -m lockstep.validate.ranks ASKED.json ANSWERED.json`.

ASKED: {"folder", "seed", "oracle", "questions": [{"name", "parallel", "fault"}]}. ANSWERED: figures'
values by question.

Shapes: T tokens of all sequences.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from lockstep.config.megatron import Parallel
from lockstep.engine.parallel import device  # first: prepares torch for Megatron
from lockstep.engine.parallel.broadcast import everyones_json
from lockstep.engine.state import TrainerState
from lockstep.engine.steps.score import score
from lockstep.validate.reference.layout_problem import problem, silent, stepped
from lockstep.validate.reference.passes import FLOOR, compare_tensors, moved_tensors, run_passes
from lockstep.validate.reference.trainers import adapter_trainer, start_rank, weights_trainer


def measure(folder: Path, seed: int, parallel: Parallel, fault: str | None, oracle: dict[str, Any]) -> dict[str, Any]:
    """This rank's differences from the oracle's numbers (`layouts.oracle`)."""
    device.rebuild_groups(parallel, seed)
    batch, slope_P = problem(seed)
    tensors = oracle["tensors"]
    trainer = weights_trainer(folder, parallel=parallel)
    with _planted(fault, trainer):
        scores_RS = score(trainer, batch, silent)
        run_passes(trainer, batch, slope_P)
        trainer.optimizer.reduce()
    gradients = {name.removeprefix("gradient/"): t for name, t in tensors.items() if name.startswith("gradient/")}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    compared = compare_tensors(trainer, "gradient", gradients, FLOOR * largest)
    adapting, adapters = adapter_trainer(folder, seed, parallel=parallel)
    with _planted(fault, adapting):
        metrics = stepped(adapting, batch, seed)
    after = {name.removeprefix("after/"): t for name, t in tensors.items() if name.startswith("after/")}
    return {
        "scores": np.nan_to_num(np.abs(scores_RS - tensors["scores"].numpy())).max(1).tolist(),
        "gradients": compared,
        "moved": moved_tensors(adapting, adapters, after),
        "metrics": {name: _off(metrics.get(name, float("nan")), value) for name, value in oracle["metrics"].items()},
    }


def _off(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 0.05)


def _planted(fault: str | None, trainer: TrainerState) -> Any:
    if fault is None:
        return nullcontext()
    from lockstep.validate.faults.layout_faults import LAYOUT_FAULTS

    return next(entry for entry in LAYOUT_FAULTS if entry.name == fault).plant(trainer)


def main(asked: Path, answered: Path) -> None:
    torch.set_num_threads(1)
    work = json.loads(asked.read_text(encoding="utf-8"))
    start_rank(work["seed"])
    oracle = {"tensors": load_file(work["oracle"]), "metrics": work["metrics"]}
    answers = {}
    for question in work["questions"]:
        try:
            own: Any = measure(
                Path(work["folder"]), work["seed"], Parallel(**question["parallel"]), question["fault"], oracle
            )
        except Exception as error:
            if question["fault"] is None:
                raise
            own = {"refused": f"{type(error).__name__}: {error}"}
        answers[question["name"]] = everyones_json(own)
    if dist.get_rank() == 0:
        answered.write_text(json.dumps(answers), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
