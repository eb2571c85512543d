"""Time and bytes/s of a weight sync: per transport, layout and policy, against the link and against vLLM's own way, in one run.

    python benchmarks/weight_sync.py                                   # tiny mixture, CPU, gloo: minutes, shows that it runs
    python benchmarks/weight_sync.py --shape qwen3-8b                  # trainer on GPU 0, server on GPU 1, nccl
    python benchmarks/weight_sync.py --shape qwen3-30b-a3b --merge-rank 16
    python benchmarks/weight_sync.py --shape qwen3-8b --gpus 0,1 --server-gpus 2   # two senders (TP2, experts EP2) to one

Weights are random: the server starts with `--load-format dummy` on a folder without weights, the senders draw theirs on their
device in the trainer's layout (`sync_sender.py`). Rows of the table: the link (`link.py`, one large tensor from the first sender's device
to the first of the server), Lockstep's cases, and vLLM's own engine: on GPUs its NCCL weight transfer, packed (`stock_sender.py`); on a
CPU, for which vLLM has none, `/collective_rpc reload_weights` from the checkpoint's files. `GB/s` of a sync is its bytes over transfer
and commit; of the link, over one broadcast. Medians of `--repeat` syncs after two to warm up: the first makes the plan and goes through
vLLM's loader, which checks the direct path.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES
from sync_common import DEADLINE_S, machine, numbers, place, run_child, run_options, write_config
from tiny import tiny_option

from lockstep.inference.client import Server
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.environment.locate import Runtime
from lockstep.inference.launch import ServerConfig, launch
from lockstep.models.checkpoint.read import expected_tensors
from lockstep.models.contract import Layout
from lockstep.models.registry import get_model_support_handler, load_model_config

HERE = Path(__file__).parent

from lockstep.testing.programs import torchrun  # noqa: E402

WARM_UP = 2
LINK_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}


def server_config(arguments: argparse.Namespace, model: Path, gpus: tuple[int, ...]) -> ServerConfig:
    """vLLM's own update endpoints are on beside ours: both are measured on one server."""
    extra = [] if arguments.shape == "tiny" else ["--load-format", "dummy"]
    if gpus:
        extra += [
            "--weight-transfer-config",
            json.dumps({"backend": "nccl"}),
            *(arguments.server_arg or ["--enforce-eager"]),
        ]
    return ServerConfig(
        model=model,
        served_name="bench",
        dtype=arguments.dtype,
        max_model_len=512,
        max_num_seqs=16,
        gpus=gpus,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        plain_weights=not gpus,
        extra_args=tuple(extra),
        extra_env={"VLLM_SERVER_DEV_MODE": "1"},
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure_link(gpus: tuple[int, ...], server_gpus: tuple[int, ...], repeat: int) -> dict[str, float]:
    """One large tensor from the first sender's device to the server's."""
    port, devices = free_port(), ["cpu", "cpu"]
    if gpus:
        devices = [f"cuda:{gpus[0]}", f"cuda:{server_gpus[0]}"]
    size = LINK_BYTES["cuda" if gpus else "cpu"]
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE / "link.py"), str(rank), str(port), device, str(size), str(repeat)],
            stdout=subprocess.PIPE,
        )
        for rank, device in enumerate(devices)
    ]
    answers = [process.communicate(timeout=DEADLINE_S)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "the link could not be measured"
    return json.loads(answers[0].splitlines()[-1])


async def lockstep_cases(
    arguments: argparse.Namespace, server: Server, model: Path, folder: Path, gpus: tuple[int, ...]
) -> dict[str, Any]:
    senders = len(gpus) or arguments.senders
    transports = arguments.transport or (["nccl"] if gpus else ["gloo"])
    cases = [
        {"transport": transport, "policy": policy, "merge_rank": merge_rank}
        for transport in transports
        for policy in arguments.policy
        for merge_rank in dict.fromkeys((0, arguments.merge_rank))
    ]
    job = {
        **{"model": str(model), "senders": senders, "gpus": list(gpus), "cases": cases, "dtype": arguments.dtype},
        **{"root_url": server.root_url, "api_key": server.api_key, "answer": str(folder / "answer.json")},
        **{
            "repeat": arguments.repeat,
            "warm_up": WARM_UP,
            "deadline_s": 300.0,
            "bucket_bytes": arguments.bucket_mb << 20,
        },
    }
    (folder / "job.json").write_text(json.dumps(job))
    await run_child(torchrun(senders, str(HERE / "sync_sender.py"), str(folder / "job.json")), folder, "senders")
    return json.loads((folder / "answer.json").read_text())


async def stock(
    arguments: argparse.Namespace, server: Server, model: Path, folder: Path, gpus: tuple[int, ...], runtime: Runtime
) -> tuple[str, list[float]]:
    """What vLLM offers by itself, on the same server: how, and the seconds of each update."""
    if gpus:
        config = load_model_config(str(model))
        shapes = expected_tensors(get_model_support_handler(str(model)), config, Layout())
        job = {
            **{"shapes": shapes, "gpu": gpus[0], "root_url": server.root_url, "api_key": server.api_key},
            **{"dtype": arguments.dtype, "repeat": arguments.repeat, "warm_up": WARM_UP},
            **{"workers": len(arguments.server_gpus)},
        }
        (folder / "stock.json").write_text(json.dumps(job))
        command = [str(runtime.python), str(HERE / "stock_sender.py"), str(folder / "stock.json")]
        log = await run_child(command, folder, "stock")
        line = next(line for line in log.splitlines() if line.startswith("SECONDS "))
        return "vLLM's nccl engine, packed", json.loads(line.removeprefix("SECONDS "))
    if arguments.shape != "tiny":
        return "vLLM has no engine for a CPU, and there are no files to reload", []
    seconds = []
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
    for _ in range(WARM_UP + arguments.repeat):
        started = time.perf_counter()
        await server.call("POST", "/collective_rpc", body, deadline_s=DEADLINE_S)
        seconds.append(time.perf_counter() - started)
    return "vLLM reload_weights from files (no engine for a CPU)", seconds[WARM_UP:]


def row(name: str, nbytes: int, seconds: float, pause_s: float | None, link: float, path: str = "") -> dict[str, Any]:
    rate = nbytes / seconds / 1e9
    return {
        **{"what": name, "bytes": nbytes, "seconds": seconds, "pause_s": pause_s, "gb_per_s": rate},
        **{"of_link": rate / link, "path": path},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | path | GB | seconds | pause s | GB/s | of the link |", "|---|---|---|---|---|---|---|"]
    for figures in rows:
        pause = "-" if figures["pause_s"] is None else f"{figures['pause_s']:.4f}"
        lines.append(
            f"| {figures['what']} | {figures['path'] or '-'} | {figures['bytes'] / 1e9:.4g} | {figures['seconds']:.4f} | {pause} "
            f"| {figures['gb_per_s']:.4g} | {figures['of_link']:.0%} |"
        )
    return "\n".join(lines)


def median_of(reports: list[dict[str, Any]], *fields: str) -> float:
    return statistics.median(sum(report[field] for field in fields) for report in reports)


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    gpus, server_gpus = tuple(arguments.gpus), tuple(arguments.server_gpus) if arguments.gpus else ()
    runtime = find_runtime("cuda" if gpus else "cpu")
    folder = Path(tempfile.mkdtemp(prefix="lockstep-bench-"))
    model = write_config(arguments.shape, folder / "model")
    link = measure_link(gpus, server_gpus, max(5, arguments.repeat))
    rows = [row("the link: one tensor", link["bytes"], link["seconds"], None, link["gb_per_s"])]
    server = await launch(server_config(arguments, model, server_gpus), runtime, folder, print)
    try:
        how, seconds = await stock(arguments, server, model, folder, gpus, runtime)
        answer = await lockstep_cases(arguments, server, model, folder, gpus)
    finally:
        await server.close()
    layout = f"TP{len(gpus) or arguments.senders} to TP{max(1, len(server_gpus))}"
    for case in answer["cases"]:
        reports = case["reports"][WARM_UP:]
        merge = f", merged rank {case['merge_rank']}" if case["merge_rank"] else ""
        name = f"{case['transport']}, {layout}, {reports[0]['policy']}{merge}"
        total, pause = median_of(reports, "transfer_s", "commit_s"), median_of(reports, "pause_s")
        rows.append(row(name, reports[0]["nbytes"], total, pause, link["gb_per_s"], reports[-1]["path"]))
    nbytes = answer["cases"][0]["reports"][0]["nbytes"]
    if seconds:
        rows.append(row(how, nbytes, statistics.median(seconds), statistics.median(seconds), link["gb_per_s"]))
    return {
        "shape": arguments.shape,
        "layout": layout,
        "machine": machine(gpus),
        "rows": rows,
        "raw": answer,
        "stock": [how, seconds],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--gpus", type=numbers, help="of the senders, one each; default 0 on a GPU host, none for tiny")
    parser.add_argument("--server-gpus", type=numbers, default=[1])
    parser.add_argument("--senders", type=int, default=1, help="sending processes on a CPU")
    parser.add_argument("--transport", action="append", help="default: nccl between GPUs, gloo on a CPU")
    parser.add_argument("--policy", action="append", choices=["auto", "staged", "streamed"])
    parser.add_argument(
        "--merge-rank", type=int, default=0, help="also merge a LoRA pair of this rank into each matrix"
    )
    parser.add_argument("--bucket-mb", type=int, default=0, help="default 128 between GPUs, 16 on a CPU")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.55)
    run_options(parser)
    tiny_option(parser, repeat=1, out=Path(os.devnull))
    arguments = parser.parse_args()
    place(arguments, arguments.shape == "tiny")
    arguments.policy = arguments.policy or ["staged", "streamed"]
    arguments.bucket_mb = arguments.bucket_mb or (128 if arguments.gpus else 16)
    return arguments


def main() -> None:
    arguments = parse()
    result = asyncio.run(measure(arguments))
    print(table(result["rows"]))
    kind = "h200" if arguments.gpus else "cpu"
    name = f"{kind}_weight_sync_{arguments.shape.replace('-', '_')}_{result['layout'].replace(' ', '_').lower()}.json"
    out = arguments.out or HERE / "results" / name
    out.write_text(json.dumps(result, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
