"""Tokens by the second of supervised steps on whole rows: LoRA rank 16, every token but a row's first with loss.

    python benchmarks/sft.py --tiny                                       # CPU, half a minute
    python benchmarks/sft.py --shape qwen3-8b --output benchmarks/results/NAME.json       # one GPU, some two minutes

The rows are random and share nothing. A step is what `lockstep sft` has the trainer do: forward, cross entropy, backward
and an AdamW update; publishing and serving the step are not part of the figure. Activations are recomputed as memory asks
for it. The median of `--repeat` steps counts, after one to warm up. `--per-row` lists numbers of rows that are packed
together; each is measured until `--budget` seconds are over.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from shapes import SHAPES

from lockstep.batching.prefix_tree import TokenSequence
from lockstep.batching.supervised import prepare_supervised
from lockstep.config.sft import SFTConfig
from packing import RANK, checkpoint_folder, open_engine, print_nothing, timed


def chats(rows: int, length: int, vocabulary: int) -> list[list[TokenSequence]]:
    """Rows as `lockstep.batching.chats` makes them: nothing was sampled by a server."""
    random = np.random.default_rng(0)
    loss_S = np.arange(length) > 0
    unknown_S, ones_S = np.full(length, np.nan, np.float32), np.ones(length, np.float32)
    return [
        [TokenSequence(str(row), random.integers(3, vocabulary, length).astype(np.int32), loss_S, unknown_S, ones_S)]
        for row in range(rows)
    ]


def measured(trainer: Any, per_row: int, options: argparse.Namespace) -> dict[str, float]:
    from lockstep.engine.steps.train_step import train_step

    config = SFTConfig(row_length=per_row * options.length)
    rows = chats(options.batch, options.length, trainer.config.vocab_size)
    batch = prepare_supervised(rows, step=1, config=config).batch
    steps: list[dict[str, float]] = []

    def step() -> None:
        steps.append(train_step(trainer, batch, config.step_config(), None, print_nothing))

    seconds, _ = timed(step, options.repeat)
    tokens = options.batch * options.length
    return {
        "chats_per_row": per_row,
        "rows": batch.rows,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": max(step["peak_memory_bytes"] for step in steps[1:]) / 2**30,
        "layers_recomputed": steps[-1]["layers_recomputed"],
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
    }


def main(options: argparse.Namespace) -> None:
    began = time.monotonic()
    report: dict[str, Any] = {"shape": options.shape, "lora_rank": RANK, "length": options.length, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint_folder(options.shape, options, Path(scratch))
        trainer = open_engine(folder, options.recompute)
        print(f"engine ready after {time.monotonic() - began:.0f} s", flush=True)
        for per_row in options.per_row:
            if time.monotonic() - began > options.budget:
                break
            report["runs"].append(measured(trainer, per_row, options))
            print(json.dumps(report["runs"][-1]), flush=True)
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")
    best = max(run["tokens_per_second"] for run in report["runs"])
    print(f"{options.shape}, LoRA {RANK}, rows of {options.length}: {best:.0f} tokens/s at best")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tiny", dest="shape", action="store_const", const="tiny", help="a tiny model, on a CPU")
    which.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--family", default="qwen3", help="family of the tiny model")
    parser.add_argument("--model", type=Path, help="a checkpoint folder to use, or to write the random one to")
    parser.add_argument("--batch", type=int, default=16, help="chats of a step")
    parser.add_argument("--length", type=int, help="tokens of a chat (tiny: 64, else 2048)")
    parser.add_argument("--per-row", type=int, nargs="+", default=[4, 2, 8, 1], help="chats that are packed together")
    parser.add_argument("--recompute", choices=["auto", "all", "none"], default="auto", help="activations, on a GPU")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--budget", type=float, default=110.0, help="seconds after which no other number is begun")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    options.length = options.length or (64 if options.shape == "tiny" else 2048)
    main(options)
