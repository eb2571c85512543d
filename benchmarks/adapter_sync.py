"""Time of an adapter from the trainer's memory to its first token, beside vLLM's way from a folder, on one server in one run.

    python benchmarks/adapter_sync.py                                        # tiny mixture, CPU, gloo: shows that it runs
    python benchmarks/adapter_sync.py --shape qwen3-8b qwen3-30b-a3b         # trainer on GPU 0, both servers on GPU 1, nccl
    python benchmarks/adapter_sync.py --shape qwen3-30b-a3b --small --gpus '' # all its modules, few dims, on a CPU

Weights are random: servers start with `--load-format dummy` on a folder that holds a config only, all at once; the sender
(`adapter_sender.py`) holds a random adapter of every default target of the family and sends it as the trainer does. From a folder: the
same adapter as PEFT writes it, in memory (/dev/shm) where there is room, through `/v1/load_lora_adapter`. Medians of `--repeat` rounds
after two to warm up, each under a name of its own.

`loaded`: until the push, or vLLM's call, returns. `first token`: from the same start until the first token under the new adapter has come.
`again`: what a first token takes a little later, when the adapter has long been there: the server's own part of it.
`without tokens`: the longest time that a stream of the base model, under way meanwhile, waited for a token; `usual` is what it waits
otherwise. The engine stands still for the difference. Phases are those of the SyncReport, and what of the push is in none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from shapes import SHAPES
from sync_common import machine, numbers, place, run_child, run_options, write_config
from tiny import tiny_option

from lockstep.inference.client import Server
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.models.registry import get_model_support_spec

HERE = Path(__file__).parent
WARM_UP = 2
CONTEXT = 4096
SMALL = {
    **{"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024},
    **{"intermediate_size": 256, "moe_intermediate_size": 64},
}


def overrides(arguments: argparse.Namespace, shape: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if arguments.small and shape != "tiny":
        settings = {name: value for name, value in SMALL.items() if name in SHAPES[shape][1]}
    if arguments.layers:
        settings["num_hidden_layers"] = arguments.layers
    return settings


def server_config(arguments: argparse.Namespace, model: Path) -> ServerConfig:
    """Room for adapters as the family's own targets need it; of the GPU's memory, weights and room and a small cache."""
    extra = ["--load-format", "dummy"]
    if arguments.gpus:
        extra += [
            "--gpu-memory-utilization",
            str(arguments.gpu_memory_utilization),
            *(arguments.server_arg or ["--enforce-eager"]),
        ]
    return ServerConfig(
        model=model,
        served_name="bench",
        dtype=arguments.dtype,
        lora=LoraServing(max_rank=arguments.rank, max_loras=2, max_cpu_loras=4, targets=targets(model)),
        max_model_len=CONTEXT if arguments.gpus else 1024,
        max_num_seqs=16,
        gpus=tuple(arguments.server_gpus) if arguments.gpus else (),
        kv_cache_bytes=2 << 30 if arguments.gpus else None,
        extra_args=tuple(extra),
    )


def targets(model: Path) -> tuple[str, ...]:
    return get_model_support_spec(str(model)).default_target_modules


async def measure(arguments: argparse.Namespace, server: Server, model: Path, folder: Path) -> dict[str, Any]:
    shared = Path("/dev/shm")
    room = shared.is_dir() and shutil.disk_usage(shared).free > 8 << 30
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-", dir=shared if room else None) as scratch:
        job = {
            **{"model": str(model), "rank": arguments.rank, "targets": targets(model), "dtype": arguments.dtype},
            **{"gpu": arguments.gpus[0] if arguments.gpus else None, "transport": arguments.transport},
            **{"root_url": server.root_url, "api_key": server.api_key, "folder": scratch + "/adapter"},
            **{"answer": str(folder / "answer.json"), "warm_up": WARM_UP, "repeat": arguments.repeat},
            **{"deadline_s": 300.0, "tokens": (CONTEXT if arguments.gpus else 1024) - 8},
        }
        (folder / "job.json").write_text(json.dumps(job))
        await run_child([sys.executable, str(HERE / "adapter_sender.py"), str(folder / "job.json")], folder, "sender")
    return json.loads((folder / "answer.json").read_text())


def median(values: list[float | None]) -> float | None:
    """None where nothing was measured: no stream was long enough."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def row(shape: str, case: dict[str, Any], nbytes: int) -> dict[str, Any]:
    rounds = case["rounds"][WARM_UP:]
    figures = {"shape": shape, "way": case["way"], "traffic": case["traffic"], "gb": nbytes / 1e9}
    figures |= {key: median([turn[key] for turn in rounds]) for key in ("seconds", "first_token_s", "again_s", "gap_s")}
    figures |= {"usual_gap_s": case["usual_gap_s"]}
    reports = [turn["report"] for turn in rounds if turn["report"]]
    for key in ("transfer_s", "commit_s", "pause_s"):
        figures[key] = median([report[key] for report in reports])
    names = list(dict.fromkeys(name for report in reports for name in report["phases"]))
    figures["phases"] = {name: median([report["phases"].get(name) for report in reports]) for name in names}
    if reports:
        rest = [turn["seconds"] - sum(turn["report"]["phases"].values()) for turn in rounds]
        figures["phases"] |= {
            "the rest": median(rest),
            "first token": median([turn["first_token_s"] - turn["seconds"] for turn in rounds]),
        }
    return figures


def table(rows: list[dict[str, Any]]) -> str:
    heading = ["shape", "from", "traffic", "GB", "transfer", "commit", "its load", "loaded", "first token", "again"]
    heading += ["without tokens", "usual"]
    lines = ["(milliseconds)", "| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    keys = ("transfer_s", "commit_s", "pause_s", "seconds", "first_token_s", "again_s", "gap_s", "usual_gap_s")
    for case in rows:
        cells = [case["shape"], case["way"], "yes" if case["traffic"] else "no", f"{case['gb']:.4g}"]
        cells += ["-" if case[key] is None else f"{case[key] * 1e3:.1f}" for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    for case in rows:
        if case["phases"]:
            parts = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in case["phases"].items())
            lines.append(f"{case['shape']}, {'traffic' if case['traffic'] else 'quiet'}: {parts}")
    return "\n".join(lines)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    runtime = find_runtime("cuda" if arguments.gpus else "cpu")
    folder = Path(tempfile.mkdtemp(prefix="lockstep-bench-"))
    models = {
        shape: write_config(shape, folder / shape / "model", overrides(arguments, shape)) for shape in arguments.shape
    }
    starting = [
        launch(server_config(arguments, model), runtime, folder / shape, print) for shape, model in models.items()
    ]
    servers = await asyncio.gather(*starting, return_exceptions=True)
    rows, raw = [], {}
    try:
        for (shape, model), server in zip(models.items(), servers, strict=True):
            if isinstance(server, BaseException):
                raise server
            answer = await measure(arguments, server, model, folder / shape)
            rows += [row(shape, case, answer["nbytes"]) for case in answer["cases"]]
            raw[shape] = answer
            print(table(rows[-len(answer["cases"]) :]), flush=True)
    finally:
        for server in servers:
            if isinstance(server, Server):
                await server.close()
    return {"machine": machine(tuple(arguments.gpus)), "small": arguments.small, "rows": rows, "raw": raw}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=["tiny", *SHAPES], default=["tiny"])
    parser.add_argument("--gpus", type=numbers, help="the sender's; default 0 on a GPU host, none for tiny")
    parser.add_argument("--server-gpus", type=numbers, default=[1])
    parser.add_argument("--transport", help="default: nccl between GPUs, gloo on a CPU")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=0, help="cut the model, for a dry run")
    parser.add_argument("--small", action="store_true", help="all modules of a shape, with few dims, for a CPU")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3, help="free memory that a server asks for")
    run_options(parser)
    tiny_option(parser, repeat=1, out=Path(os.devnull))
    arguments = parser.parse_args()
    place(arguments, arguments.shape == ["tiny"])
    arguments.transport = arguments.transport or ("nccl" if arguments.gpus else "gloo")
    return arguments


def main() -> None:
    arguments = parse()
    result = asyncio.run(run(arguments))
    print(table(result["rows"]))
    shapes = "_".join(shape.replace("-", "_") for shape in arguments.shape)
    kind = "h200" if arguments.gpus else "cpu"
    out = arguments.out or HERE / "results" / f"{kind}_adapter_sync_{shapes}{'_small' if arguments.small else ''}.json"
    out.write_text(json.dumps(result, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
