"""What benchmarks of real steps share: a random model with a tokenizer, rollouts from the run's server, its logs, and a clock."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from shapes import DECIDED, SHAPES, write_random

import lockstep as ls
from lockstep.config.lora import SERVED_RANKS
from lockstep.models.tiny.tokenizer import save_tokenizer
from lockstep.models.tiny.write import write_tiny

STARTED = time.monotonic()


def passed_s() -> float:
    """Seconds since this program began."""
    return time.monotonic() - STARTED


def say(text: str) -> None:
    print(f"{passed_s():7.1f} s  {text}", flush=True)


def model_options(parser: argparse.ArgumentParser, family: str) -> None:
    """family: of the tiny model, unless another is asked for."""
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--family", default=family, help="family of the tiny model")
    parser.add_argument("--layers", type=int, help="so many layers in place of the shape's own")
    parser.add_argument("--model", type=Path, help="a checkpoint folder to use, or to write the random one to")
    parser.add_argument("--rank", type=int, default=16, choices=SERVED_RANKS, help="LoRA rank")
    parser.add_argument("--full", action="store_true", help="train all weights (merged mode)")
    parser.add_argument("--prompts", type=int, default=4, help="groups per step, of two replies each")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a reply that is trained on")
    parser.add_argument("--server-arg", action="append", default=[], help="a further argument of vLLM's command line")
    parser.add_argument("--logs", type=Path, help="copy the run's logs to this folder at the end, whatever the end is")
    parser.add_argument("--output", type=Path, help="write every figure as JSON")


def checkpoint(options: argparse.Namespace, scratch: Path) -> Path:
    """The random model's folder; one that is there already is used as it is."""
    folder = options.model or scratch / "model"
    if (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    overrides = {"num_hidden_layers": options.layers} if options.layers else {}
    if options.shape == "tiny":
        return write_tiny(options.family, folder, overrides=overrides)
    # Drawn so that a router's choices don't hang on the last bits, and layers don't add to each
    # other's noise: the verification compares two programs in bf16. A tied head would turn such an
    # embedding into huge logits.
    tied = SHAPES[options.shape][1].get("tie_word_embeddings", False)
    # In a process of its own, which leaves nothing on the GPU.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(write_random, options.shape, folder, overrides, None if tied else DECIDED).result()
    save_tokenizer(folder)
    return folder


async def rollouts(model: ls.TrainableModel, prompts: int, tokens: int) -> list[ls.TrajectoryGroup]:
    """Groups of two replies to made-up prompts, one rewarded and one not."""
    client, name = model.openai_client(), model.inference_name()

    async def group(number: int) -> ls.TrajectoryGroup:
        messages = [{"role": "user", "content": f"Say something about the number {number}."}]
        reply = await client.chat.completions.create(
            model=name,
            messages=messages,  # pyright: ignore[reportArgumentType]
            n=2,
            max_tokens=tokens,
            extra_body={"ignore_eos": True},
        )
        pairs = enumerate(reply.choices)
        return ls.TrajectoryGroup(
            trajectories=[
                ls.Trajectory(messages_and_choices=[*messages, choice], reward=float(reward))
                for reward, choice in pairs
            ]
        )

    return list(await asyncio.gather(*(group(number) for number in range(prompts))))


def keep_logs(runs: Path, folder: Path | None) -> None:
    """Copies the logs of every run below `runs`, which is scratch, to where they stay."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for log in runs.glob("*/*/logs/*.log"):
        shutil.copy(log, folder / log.name)


def measured(options: argparse.Namespace, measure: Callable[[argparse.Namespace, Path, Path], Any]) -> Any:
    """What `measure` says of the options, the model that they name and a folder for its runs."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(options, Path(scratch))
        say(f"the model is in {folder}")
        return asyncio.run(measure(options, folder, Path(scratch) / "runs"))


def conclude(options: argparse.Namespace, report: dict[str, Any], faults: list[str], success: str) -> None:
    """Writes the report and ends the program: with status 1 and a line for each fault, or with what went well."""
    if options.output:
        settings = {name: str(value) for name, value in vars(options).items()}
        options.output.write_text(json.dumps({"options": settings, **report, "faults": faults}, indent=1))
    for fault in faults:
        print(f"FAILED: {fault}")
    if faults:
        sys.exit(1)
    print(success)
