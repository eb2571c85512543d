"""What the benchmarks of syncs share: a model that is a config only, programs under a guard, and small things of the command line."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
from pathlib import Path
from typing import Any

from shapes import SHAPES

from lockstep.models.tiny.tokenizer import save_tokenizer
from lockstep.models.tiny.write import write_tiny
from lockstep.process.child import child_env, spawn

DEADLINE_S = 900.0


def write_config(shape: str, folder: Path, overrides: dict[str, Any] | None = None) -> Path:
    """A folder with the shape's config, some fields overridden, a tokenizer and no weights; for "tiny" a whole
    checkpoint, which vLLM's reload reads.
    """
    if shape == "tiny":
        return write_tiny("qwen3_moe", folder, seed=1, overrides=overrides)
    import transformers

    kind, fields = SHAPES[shape]
    config = getattr(transformers, kind)(**fields | (overrides or {}))
    config.architectures = [kind.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


async def run_child(command: list[str], folder: Path, name: str, python_path: str = "") -> str:
    """A program under our guard; its log's text."""
    env = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
        "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
    }
    if python_path or "PYTHONPATH" in os.environ:
        env["PYTHONPATH"] = os.pathsep.join(path for path in (python_path, os.environ.get("PYTHONPATH", "")) if path)
    child = spawn(command, child_env(env), folder / f"{name}.log", name)
    status = await asyncio.to_thread(child.wait, DEADLINE_S)
    assert status == 0, f"{name} ended with status {status}:\n{child.log_tail(40)}"
    return child.log_path.read_text()


def machine(gpus: tuple[int, ...]) -> str:
    if not gpus:
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    import torch

    return f"{torch.cuda.get_device_name(gpus[0])}, torch {torch.__version__}"


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def run_options(parser: argparse.ArgumentParser) -> None:
    """Of every benchmark of syncs."""
    parser.add_argument(
        "--server-arg", action="append", help="of vLLM's command line; none given: --enforce-eager, which starts sooner"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)


def place(arguments: argparse.Namespace, tiny: bool) -> None:
    """Where it runs and in which dtype, as far as the command line leaves that open."""
    if arguments.gpus is None:
        arguments.gpus = [] if tiny else [0]
    arguments.dtype = "bfloat16" if arguments.gpus else "float32"
    arguments.server_arg = arguments.server_arg or ["--enforce-eager"]
