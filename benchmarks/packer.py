"""Time to pack a million tokens into rows, on one core, for many shapes of input.

    python benchmarks/packer.py
    python benchmarks/packer.py --layers 48 --top-k 8      # with routed experts as large as Qwen3-30B-A3B's

Best of `--repeat`, by process time and by the clock. Row length and everything else is what `pack` chooses by itself. "copy" is what
one copy of all routed experts takes in the same run: the packer makes two, end to end and to rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tiny import tiny_option

from lockstep.batching.pack import pack, packing_metrics
from lockstep.batching.prefix_tree import TokenSequence

VOCABULARY = 150_000
Drawn = tuple[np.ndarray, int, np.ndarray]  # token ids end to end, tokens of prompt in each sequence, lengths


def apart(random: np.random.Generator, total: int, length: int) -> Drawn:
    """Nothing in common but first tokens by chance."""
    count = total // length
    return random.integers(VOCABULARY, size=count * length), max(1, length // 2), np.full(count, length)


def groups(random: np.random.Generator, total: int, samples: int, length: int, shared: int) -> Drawn:
    count = max(1, total // length // samples)
    tokens_GNS = random.integers(VOCABULARY, size=(count, min(samples, total // length), length))
    tokens_GNS[:, :, :shared] = tokens_GNS[:, :1, :shared]
    return tokens_GNS.ravel(), max(1, shared), np.full(tokens_GNS.shape[0] * tokens_GNS.shape[1], length)


def same_start(random: np.random.Generator, total: int, samples: int, length: int, shared: int) -> Drawn:
    """Groups whose replies start with the same token, which each sampled with another log-probability."""
    tokens_X, _, length_Q = groups(random, total, samples, length, shared + 1)
    return tokens_X, shared, length_Q


def branching(random: np.random.Generator, total: int, turns: int, part: int) -> Drawn:
    """Trees that branch in three at each turn."""
    leaves, length = 3**turns, turns * part
    tokens_GTLP = random.integers(VOCABULARY, size=(max(1, total // leaves // length), turns, leaves, part))
    for turn in range(turns):
        alike = 3 ** (turns - turn - 1)
        tokens_GTLP[:, turn] = np.repeat(tokens_GTLP[:, turn, ::alike], alike, axis=1)
    tokens_X = tokens_GTLP.swapaxes(1, 2).ravel()
    return tokens_X, 1, np.full(len(tokens_X) // length, length)


def chain(random: np.random.Generator, total: int) -> Drawn:
    """Each sequence is the one before and a token more."""
    tokens = random.integers(VOCABULARY, size=int((2 * total) ** 0.5))
    length_Q = np.arange(1, len(tokens) + 1)
    return np.concatenate([tokens[:size] for size in length_Q]), 1, length_Q


SHAPES: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "1,000 x 1,000": lambda random, total: apart(random, total, 1000),
    "10,000 x 100": lambda random, total: apart(random, total, 100),
    "100,000 x 10": lambda random, total: apart(random, total, 10),
    "500,000 x 2": lambda random, total: apart(random, total, 2),
    "1,000,000 x 1": lambda random, total: apart(random, total, 1),
    "41 groups of 8 x 3,072, 2,048 shared": lambda random, total: groups(random, total, 8, 3072, 2048),
    "12,500 groups of 8 x 10, 5 shared": lambda random, total: groups(random, total, 8, 10, 5),
    "the same, replies start alike": lambda random, total: same_start(random, total, 8, 10, 5),
    "one group of 100,000 x 10, 5 shared": lambda random, total: groups(random, total, total, 10, 5),
    "the same, replies start alike ": lambda random, total: same_start(random, total, total, 10, 5),
    "trees of 27 x 300, 3 turns": lambda random, total: branching(random, total, 3, 100),
    "trees of 243 x 10, 5 turns": lambda random, total: branching(random, total, 5, 2),
    "chain of 1,414": chain,
}


def sequences_of(
    drawn: Drawn, random: np.random.Generator, alike: bool, routed_experts: tuple[int, int]
) -> list[TokenSequence]:
    """`alike`: all sampled with the same log-probability. `routed experts`: (layers, experts per token), 0 layers for none."""
    tokens_X, prompt, length_Q = drawn[0].astype(np.int32), drawn[1], drawn[2]
    stop_Q = np.cumsum(length_Q)
    mask_X = np.arange(len(tokens_X)) - np.repeat(stop_Q - length_Q, length_Q) >= prompt
    logprobs_X = np.float32(-1) if alike else -random.exponential(size=len(tokens_X)).astype(np.float32)
    logprobs_X = np.where(mask_X, logprobs_X, np.float32(np.nan))
    temperatures_X = np.ones(len(tokens_X), np.float32)
    layers, top_k = routed_experts
    # The same experts for the same token, so that what is shared without routed experts is shared with them.
    experts_VLK = (random.integers(128 // top_k, size=(997, layers, top_k)) * top_k + np.arange(top_k)).astype(np.uint8)
    experts_XLK = experts_VLK[tokens_X % 997] if layers else None
    return [
        TokenSequence(
            f"sequence {number}",
            tokens_X[start:stop],
            mask_X[start:stop],
            logprobs_X[start:stop],
            temperatures_X[start:stop],
            None if experts_XLK is None else experts_XLK[start:stop],
        )
        for number, (start, stop) in enumerate(zip((stop_Q - length_Q).tolist(), stop_Q.tolist(), strict=True))
    ]


def measured(sequences: list[TokenSequence], repeat: int) -> dict[str, float]:
    """Least seconds, and what packing came to."""
    ones_Q, seconds = np.ones(len(sequences)), []
    flat_XLK = np.concatenate(
        [sequence.experts_SLK for sequence in sequences if sequence.experts_SLK is not None] or [np.zeros(0)]
    )
    for _ in range(repeat):
        clock, process = time.perf_counter(), time.process_time()
        batch = pack(sequences, ones_Q, ones_Q)
        packed, clock = time.process_time() - process, time.perf_counter() - clock
        process = time.process_time()
        flat_XLK.copy()
        seconds.append((packed, clock, time.process_time() - process))
    process, clock, copy = np.min(seconds, axis=0).tolist()
    return {"process_seconds": process, "clock_seconds": clock, "copy_seconds": copy, **packing_metrics(batch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=0, help="layers of routed experts; 0: none")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", help="shapes with this in their name")
    parser.add_argument("--output", type=Path)
    tiny_option(parser, tokens=20_000, repeat=1)
    options = parser.parse_args()
    figures = {}
    print(f"{'shape':40}{'process s':>10}{'clock s':>10}{'copy s':>8}{'shared':>8}{'padding':>9}")
    for name, draw in SHAPES.items():
        if options.only and options.only not in name:
            continue
        random = np.random.default_rng(0)
        alike = "start alike" not in name
        sequences = sequences_of(draw(random, options.tokens), random, alike, (options.layers, options.top_k))
        figures[name] = row = measured(sequences, options.repeat)
        del sequences
        print(
            f"{name:40}{row['process_seconds']:10.3f}{row['clock_seconds']:10.3f}"
            f"{row['copy_seconds']:8.3f}{row['shared_share']:8.2f}{row['padding_share']:9.3f}",
            flush=True,
        )
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
