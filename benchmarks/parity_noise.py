"""How far fp32 lies from Hugging Face on CPU, over freshly drawn tiny models: one row per family,
the largest figure of all draws.

    PYTHONPATH=tests/support:tests/support/engine torchrun --nproc-per-node 1 benchmarks/parity_noise.py --draws 100

Rows "fp32" and "fp64" are our fp32 against Hugging Face in fp32 and in fp64, "exact" is both in
fp64, "theirs" Hugging Face in fp32 against itself in fp64. A cell is the median, the largest, and
how many are over the tests' limit. Logits count from the largest logit, gradients from their
tensor's largest entry (with the tests' floor).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_option

import parity
from cases import hugging_face_fp64, tiny
from lockstep.config.megatron import Parallel
from lockstep.engine.parallel import device
from random_models import random_fields

FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "llama3")


def theirs(actual: Any, expected: Any) -> dict[str, float]:
    """Distances of one Hugging Face run from another."""
    _, gradients, logits, loss = expected
    floor = parity.FLOOR * max(float(g.abs().max()) for g in gradients.values())
    off = {
        name: float((actual[1][name] - g).abs().max()) / max(float(g.abs().max()), floor)
        for name, g in gradients.items()
    }
    return {
        "loss": abs(actual[3] - loss) / max(1.0, abs(loss)),
        "logits": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual[2], logits, strict=True)),
        "gradient": max(off.values()),
    }


def draw(family: str, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """One model, one batch of trees."""
    tiny(family, folder, seed=seed, dtype="float32", **random_fields(family, np.random.default_rng(seed)))
    sizes, batch, slope_P = parity.problem({}, seed, 0.7)
    narrow = parity.reference(folder, batch, slope_P)
    wide = parity.reference(folder, batch, slope_P, hugging_face_fp64)
    return {
        "fp32": parity.measure(folder, sizes, batch, slope_P, narrow[1:], "float32")[0],
        "fp64": parity.measure(folder, sizes, batch, slope_P, wide[1:], "float32")[0],
        "exact": parity.measure(folder, sizes, batch, slope_P, wide[1:], "float64")[0],
        "theirs": theirs(narrow, wide),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    tiny_option(parser, draws=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device.start(Parallel(), seed=0)
    names = ("loss", "logits", "gradient")
    for family in asked.families:
        errors = []
        for seed in range(asked.seed, asked.seed + asked.draws):
            with tempfile.TemporaryDirectory() as scratch:
                errors.append(draw(family, seed, Path(scratch, "model")))
        for kind in errors[0]:
            values = {name: [error[kind][name] for error in errors] for name in names}
            over = {name: sum(v > parity.LIMITS[name] for v in values[name]) for name in names}
            cells = [f"{np.median(values[n]):.1e} {max(values[n]):.1e} {over[n]}" for n in names]
            print(f"| {family} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
