"""Time and peak memory of one training step: packed as prefix trees, as plain rows, and with Hugging Face + PEFT.

    python benchmarks/packing.py                                  # tiny model, CPU, a minute
    python benchmarks/packing.py --shape qwen3-8b --budget 540    # on a GPU, random weights
    python benchmarks/packing.py --shape qwen3-8b qwen3-30b-a3b qwen3.5-9b qwen3.5-35b-a3b --layers 12 --budget 1500

Every contender gets the same sequences: groups that share a prompt (share 0 to 0.95, 4 to 32 samples), and a three-turn
tree that branches at each turn. A step is forward, loss, backward and an AdamW update of LoRA rank 16 on the family's
default targets. Activations are recomputed as memory asks for it (`--recompute`); Hugging Face + PEFT always does so on a
GPU, and leaves routed experts out. Each contender runs in a process of its own, all in one call of this program; the
median of `--repeat` steps counts, after one to warm up. `ideal` is our own step on one row with as many unique tokens and
nothing to share.

Cases come in order of importance. `--budget` seconds are divided evenly over what is left to run; a contender whose part is
over starts no further case, and what was not run, or ran out of memory, is empty in the table. Figures are written as they
come. `--layers` cuts the models' depth, where disk or time don't allow all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from shapes import SHAPES, write_random
from tiny import tiny_option

from lockstep.batching.pack import pack, packing_metrics
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.prefix_tree import TokenSequence

CONTENDERS = ("packed", "hf", "ideal", "unpacked")
RANK, ALPHA = 16, 32.0

Figures = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One batch. kind "group": `samples` of `length` tokens, the first `share` of them equal. kind "tree": three turns,
    each branching.
    """

    kind: str
    samples: int
    share: float
    length: int

    @property
    def name(self) -> str:
        return (
            f"{self.samples} x {self.length}, share {self.share:.2f}"
            if self.kind == "group"
            else f"tree, {self.samples} leaves"
        )


Run = Callable[[Case], Figures]


def sequence(name: str, tokens: list[int], sampled: list[bool]) -> TokenSequence:
    mask_S = np.array(sampled)
    logprobs_S = np.where(mask_S, np.float32(-5), np.float32(np.nan))
    ones_S = np.ones(len(tokens), np.float32)
    return TokenSequence(name, np.array(tokens, np.int32), mask_S, logprobs_S, ones_S)


def sequences_of(case: Case, vocabulary: int) -> list[TokenSequence]:
    """The case's sequences; the part that is not shared was sampled."""
    random = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return random.integers(3, vocabulary, count).tolist()

    if case.kind == "group":
        shared = draw(round(case.share * case.length))
        own = case.length - len(shared)
        tails = [draw(own) for _ in range(case.samples)]
        mask = [False] * max(1, len(shared)) + [True] * (case.length - max(1, len(shared)))
        return [sequence(f"sample {k}", shared + tail, mask) for k, tail in enumerate(tails)]
    turns, branches = 3, round(case.samples ** (1 / 3))
    part = case.length // (2 * turns)  # each turn: so many tokens of prompt or tool output, so many sampled
    paths: list[tuple[list[int], list[bool]]] = [([], [])]
    for _ in range(turns):
        grown = []
        for tokens, mask in paths:
            given = draw(part)
            replies = [draw(part) for _ in range(branches)]
            grown += [(tokens + given + reply, mask + [False] * part + [True] * part) for reply in replies]
        paths = grown
    return [sequence(f"leaf {k}", tokens, mask) for k, (tokens, mask) in enumerate(paths)]


def batch_of(case: Case, contender: str, vocabulary: int, row_length: int | None) -> PackedBatch:
    """What our engine gets: rows of trees, rows of whole sequences, or one row of unshared tokens as long as the trees
    together.
    """
    sequences = sequences_of(case, vocabulary)
    count = len(sequences)
    advantages = np.where(np.arange(count) % 2, 1.0, -1.0)
    longest = max(map(len, sequences))
    one_row = pack(sequences, advantages, np.ones(count), row_length=sum(map(len, sequences)))
    unique = int((one_row.nodes_RS >= 0).sum())
    room = max(longest, row_length or unique)
    if contender == "unpacked":
        return pack(
            sequences, advantages, np.ones(count), row_length=max(longest, row_length or longest), share_prefixes=False
        )
    if contender == "packed":
        return pack(sequences, advantages, np.ones(count), row_length=room)
    share = int(one_row.loss_mask_RS.sum()) / unique  # the loss head is to cost the same
    plain = []
    for start in range(0, unique, longest):  # pieces as long as a sequence: attention costs what such contexts must
        size = min(longest, unique - start)
        scored = min(size - 1, round(share * size))
        tokens = np.random.default_rng(start).integers(3, vocabulary, size).tolist()
        plain.append(sequence(f"piece {len(plain)}", tokens, [False] * (size - scored) + [True] * scored))
    ones = np.ones(len(plain))
    return pack(plain, ones, ones, row_length=room, share_prefixes=False)


def peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(step: Callable[[], None], repeat: int) -> tuple[float, int]:
    """(median seconds after one warm-up, peak bytes)."""
    import torch

    def synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeat):
        synchronise()
        start = time.perf_counter()
        step()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), peak_bytes()


def open_engine(folder: Path, recompute: str) -> Any:
    """Our engine in this process, with LoRA on the family's default targets. Device start-up as in
    `lockstep.engine.worker`.
    """
    from lockstep.config.megatron import Parallel
    from lockstep.engine.parallel import device
    from lockstep.engine.state import open_trainer
    from lockstep.models.registry import default_target_modules_for_model
    from lockstep.trainer.protocol import EngineConfig, LoraSettings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for key, value in {
        "MASTER_ADDR": "127.0.0.1",
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_PORT": port,
    }.items():
        os.environ[key] = str(value)
    device.start(Parallel(), seed=0)
    lora = LoraSettings(RANK, ALPHA, tuple(default_target_modules_for_model(str(folder))))
    dtype = "bfloat16" if device.CUDA else "float32"
    recomputed = {"auto": None, "all": True, "none": False}[recompute]
    return open_trainer(EngineConfig(str(folder), Parallel(), dtype, lora, recompute=recomputed))


def engine(folder: Path, contender: str, options: argparse.Namespace) -> Run:
    """A contender of ours."""
    from lockstep.config.train import TrainConfig
    from lockstep.engine.parallel import device
    from lockstep.engine.steps.train_step import train_step

    trainer = open_engine(folder, options.recompute)
    config = TrainConfig(max_mismatch=None, learning_rate=1e-5)

    def run(case: Case) -> Figures:
        batch = batch_of(case, contender, trainer.config.vocab_size, options.row_length)
        steps: list[dict[str, float]] = []
        seconds, peak = timed(
            lambda: steps.append(train_step(trainer, batch, config, None, print_nothing)), options.repeat
        )
        if device.CUDA:  # each step reports its own peak and starts a new count
            peak = int(max(step["peak_memory_bytes"] for step in steps[1:]))
        metrics = packing_metrics(batch)
        return {
            "seconds": seconds,
            "peak_bytes": peak,
            "tokens": metrics["tokens_computed"],
            "rows": metrics["rows"],
            "layers_recomputed": steps[-1]["layers_recomputed"],
        }

    return run


def print_nothing(_event: dict[str, Any]) -> None:
    """The progress a benchmark does not show."""


def hugging_face(folder: Path, options: argparse.Namespace) -> Run:
    """transformers + PEFT: one sequence per forward pass, loss head in chunks, fused AdamW, gradient checkpointing on
    GPU.
    """
    import peft
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint
    from transformers import AutoModelForCausalLM

    from lockstep.models.registry import default_target_modules_for_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    targets = [name for name in default_target_modules_for_model(str(folder)) if name != "experts"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    if device == "cuda":
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped.enable_input_require_grads()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda")
    head = model.lm_head.weight

    def piece_logprob(hidden_NH: Any, target_N: Any) -> Any:
        return -F.cross_entropy((hidden_NH @ head.T).float(), target_N, reduction="none")

    def step(sequences: list[TokenSequence]) -> None:
        total = sum(sequence.scored for sequence in sequences)
        for number, sequence in enumerate(sequences):
            ids_S = torch.from_numpy(sequence.tokens_S.astype(np.int64)).to(device)
            hidden_SH = wrapped.base_model.model.model(input_ids=ids_S[None]).last_hidden_state[0]
            scored_N = torch.from_numpy(np.flatnonzero(sequence.loss_mask_S)).to(device)
            sign = 1.0 if number % 2 else -1.0
            parts = [
                checkpoint(piece_logprob, hidden_SH[places_N - 1], ids_S[places_N], use_reentrant=False)
                for places_N in scored_N.split(1024)
            ]
            old = torch.from_numpy(sequence.logprobs_S[sequence.loss_mask_S]).to(device)
            new = torch.cat(parts)
            ((new.detach() - old).exp().clamp(0, 5) * -sign * new).sum().div(total).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def run(case: Case) -> Figures:
        sequences = sequences_of(case, model.config.vocab_size)
        seconds, peak = timed(lambda: step(sequences), options.repeat)
        tokens = float(sum(map(len, sequences)))
        return {"seconds": seconds, "peak_bytes": peak, "tokens": tokens, "rows": float(len(sequences))}

    return run


def work(cases: Sequence[Case], options: argparse.Namespace) -> None:
    """One contender: a line of JSON per case as it is done, until the deadline."""
    import torch

    run = (
        hugging_face(options.model, options)
        if options.worker == "hf"
        else engine(options.model, options.worker, options)
    )
    with options.output.open("w") as file:
        for case in cases:
            if time.time() > options.deadline:
                return
            try:
                figures = run(case)
            except torch.OutOfMemoryError:
                figures = {"error": "out of memory"}
                torch.cuda.empty_cache()
            file.write(json.dumps({"case": case.name, **figures}) + "\n")
            file.flush()


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The most telling ones first: the reference group, a tree, the ends of the range, the rest."""
    base = 8 if 8 in options.samples else options.samples[0]
    first = [Case("group", base, min(options.shares, key=lambda share: abs(share - 2 / 3)), options.length)]
    trees = [Case("tree", leaves, 0.0, options.length) for leaves in options.trees]
    ends = [Case("group", base, share, options.length) for share in (max(options.shares), min(options.shares))]
    shares = [Case("group", base, share, options.length) for share in options.shares]
    groups = [Case("group", samples, first[0].share, options.length) for samples in options.samples]
    return list(dict.fromkeys([*first, *trees, *ends, *groups, *shares]))


def table(cases: Sequence[Case], figures: dict[str, dict[str, Figures]]) -> str:
    """One line per case: seconds and GiB of each contender, and the others' time relative to packed."""
    names = [name for name in CONTENDERS if name in figures]
    ratios = [name for name in names if name != "packed" and "packed" in figures]
    header = f"{'case':28}" + "".join(f"{name + ' s':>12}{'GiB':>7}" for name in names)
    lines = [header + "".join(f"{name + '/packed':>16}" for name in ratios)]
    for case in cases:
        here = {name: figures[name].get(case.name, {}) for name in names}
        line = f"{case.name:28}"
        for name in names:
            seconds, peak = here[name].get("seconds"), here[name].get("peak_bytes")
            line += f"{'-':>12}{'-':>7}" if seconds is None else f"{seconds:12.3f}{peak / 2**30:7.2f}"
        for name in ratios:
            both = "seconds" in here[name] and "seconds" in here["packed"]
            line += f"{here[name]['seconds'] / here['packed']['seconds']:16.2f}" if both else f"{'-':>16}"
        lines.append(line)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=["tiny", *SHAPES], default=["tiny"])
    parser.add_argument("--layers", type=int, help="cut the models to so many layers")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    parser.add_argument("--family", default="qwen3", help="family of the tiny model")
    parser.add_argument("--model", type=Path, help="a checkpoint folder to use, or to write the random one to")
    parser.add_argument("--length", type=int, help="tokens per sequence (tiny: 192, else 3072)")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.5, 2 / 3, 0.9, 0.95])
    parser.add_argument("--samples", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--trees", type=int, nargs="*", default=[27], help="leaves of three-turn branching trees")
    parser.add_argument("--row-length", type=int, help="tokens per row; left out: all trees of a case in one row")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--recompute", choices=["auto", "all", "none"], default="auto", help="activations, on a GPU")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    tiny_option(parser, shares=[2 / 3], samples=[4], trees=[9], repeat=1)
    options = parser.parse_args()
    options.length = options.length or (192 if options.shape == ["tiny"] else 3072)
    return options


def checkpoint_folder(shape: str, options: argparse.Namespace, scratch: Path) -> Path:
    folder = options.model or scratch / "model"
    if (folder / "config.json").is_file():
        return folder
    overrides = {"num_hidden_layers": options.layers} if options.layers else {}
    if shape == "tiny":
        from lockstep.models.tiny.write import write_tiny

        return write_tiny(options.family, folder, overrides=overrides)
    return write_random(shape, folder, overrides)


def contend(shape: str, contender: str, folder: Path, deadline: float, result: Path) -> dict[str, Figures]:
    """Run one contender in a process of its own; what it got done, by case."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", contender, "--shape", shape, "--model", str(folder)]
    command += ["--deadline", str(deadline), "--output", str(result)]
    done = subprocess.run(command, check=False, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    if done.returncode:
        print(f"{contender} ended with {done.returncode}: what it has not written is missing", flush=True)
    lines = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
    return {line["case"]: line for line in lines}


def measure(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Every contender on every shape; the table and the file grow as figures come."""
    end = time.time() + options.budget
    left = len(options.shape) * len(options.contenders)
    report: dict[str, Any] = {"layers": options.layers, "cases": [asdict(case) for case in cases], "found": {}}
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as scratch:
            folder = checkpoint_folder(shape, options, Path(scratch))
            figures = report["found"].setdefault(shape, {})
            for contender in options.contenders:
                deadline = time.time() + max(0.0, end - time.time()) / left
                print(f"{shape}: running {contender} on up to {len(cases)} cases ...", flush=True)
                figures[contender] = contend(shape, contender, folder, deadline, Path(scratch) / f"{contender}.jsonl")
                left -= 1
                if options.output:
                    options.output.write_text(json.dumps(report, indent=1))
            print(f"\n{shape}\n{table(cases, figures)}\n", flush=True)
            if not options.model:
                shutil.rmtree(folder)


def main() -> None:
    options = parse()
    if options.model and len(options.shape) > 1:
        sys.exit("--model is one checkpoint: give one --shape")
    if options.worker:
        work(cases_of(options), options)
    else:
        measure(options, cases_of(options))


if __name__ == "__main__":
    main()
