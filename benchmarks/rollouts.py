"""Rollouts as a user runs them, against vLLM's own offline generation of the same requests on the same machine.

    python benchmarks/rollouts.py --model DIR --output benchmarks/results/h200_rollouts_smollm2.json   # one GPU
    python benchmarks/rollouts.py --tiny                                                               # CPU, two minutes

Rollouts: `gather_trajectory_groups` of groups of 8, each rollout one chat completion through the model's client, the
server started as a run starts it, adapters included. Replies have a fixed length (`ignore_eos`). The clock runs from
the call to its return. CPU seconds are of the whole process: the user's own, the server's API and its engine.

Offline: `LLM.generate` in the server's environment, after the server has ended, with the same prompts' tokens, adapter,
context and sequences, each prompt new to the prefix cache. `plain` samples only; `logprobs` also returns what training needs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import lockstep as ls
from lockstep.backends.base import Endpoint
from lockstep.inference.client import Server
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.environment.locate import Runtime, default_kind
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.model import open_client
from lockstep.models.registry import get_model_support_spec
from lockstep.models.tiny.write import write_tiny
from lockstep.process.child import child_env
from lockstep.rollouts.router import Replica, Router

GROUP = 8
RANK = 16


def questions(count: int, round_: int) -> list[str]:
    """Short prompts, of which no two rounds share a whole one."""
    return [
        f"[{round_}] What is {number * 37 % 91} + {number * 53 % 97} - {number % 13}? Answer with a number."
        for number in range(count)
    ]


def cpu_seconds(servers: list[Server]) -> dict[str, float]:
    """CPU seconds so far: `user` of this process, `api`, `engine` and `workers` of the servers."""
    guards = {server.child.pid for server in servers}
    tick, parents, spent = os.sysconf("SC_CLK_TCK"), {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process has ended
        parents[int(stat.parent.name)] = int(fields[1])
        spent[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / tick
    seconds = {"user": time.process_time()}
    for pid, value in spent.items():
        depth, above = 1, parents[pid]
        while above not in (*guards, 0, 1):
            depth, above = depth + 1, parents.get(above, 0)
        if above in guards:
            label = ("api", "engine", "workers")[min(depth, 3) - 1]
            seconds[label] = seconds.get(label, 0.0) + value
    return seconds


async def one_round(client: Any, model: str, tokens: int, requests: int, round_: int) -> int:
    """Gather `requests` rollouts; returns the tokens they sampled."""

    async def rollout(question: str) -> ls.Trajectory:
        messages: list[Any] = [{"role": "user", "content": question}]
        reply = await client.chat.completions.create(
            model=model, messages=messages, max_completion_tokens=tokens, extra_body={"ignore_eos": True}
        )
        return ls.Trajectory(messages_and_choices=[*messages, reply.choices[0]], reward=0.0)

    asked = questions(requests // GROUP, round_)
    groups = await ls.gather_trajectory_groups(
        [[rollout(text) for _ in range(GROUP)] for text in asked], progress=False
    )
    return sum(len(choice.token_ids) for group in groups for each in group.trajectories for choice in each.choices)


async def through_lockstep(
    config: ServerConfig, runtime: Runtime, scratch: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second and CPU seconds of each repetition, by reply length."""
    servers = await asyncio.gather(*(launched(config, runtime, scratch, number) for number in range(options.replicas)))
    replicas = tuple(Replica(number, server.base_url, server.api_key) for number, server in enumerate(servers))
    endpoint = Endpoint(
        servers[0].base_url,
        servers[0].api_key,
        config.max_num_seqs,
        config.max_model_len,
        siblings=not options.alone,
        replicas=replicas,
    )
    router = Router(lambda: replicas) if len(replicas) > 1 else None
    client = open_client(endpoint, itertools.count().__next__, router)
    results: dict[str, Any] = {}
    try:
        model = config.served_name
        if options.adapter:
            model = "adapter@1"
            for server in servers:
                await server.load_adapter(model, options.adapter)
        for tokens in options.tokens:
            await one_round(client, model, tokens, options.requests, -tokens)
            rates, spent = [], []
            for round_ in range(options.repeat):
                before, started = cpu_seconds(servers), time.perf_counter()
                sampled = await one_round(client, model, tokens, options.requests, round_ * 1000 + tokens)
                seconds = time.perf_counter() - started
                after = cpu_seconds(servers)
                rates.append(sampled / seconds)
                spent.append({name: round(after[name] - before.get(name, 0.0), 3) for name in after})
            results[str(tokens)] = {"tokens_per_second": rates, "cpu_seconds": spent}
            print(tokens, [round(rate) for rate in rates], spent[-1], flush=True)
    finally:
        await client.close()
        for server in servers:
            await server.close()
    return results


async def launched(config: ServerConfig, runtime: Runtime, scratch: Path, number: int) -> Server:
    """One of the servers; on a GPU each has its own."""
    if runtime.kind == "cuda":
        config = config.model_copy(update={"gpus": (number,)})
    return await launch(config, runtime, scratch, lambda line: print(line, flush=True), f"server-{number}.log", number)


def offline(config: ServerConfig, runtime: Runtime, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    asked = questions(options.requests // GROUP, 10**6)
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in asked
        for _ in range(GROUP)
    ]
    engine: dict[str, Any] = {
        "model": str(config.model), "dtype": config.dtype, "max_model_len": config.max_model_len, "seed": 1,
        "max_num_seqs": config.max_num_seqs, "generation_config": "vllm",
    }  # fmt: skip
    if runtime.kind == "cpu":
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": config.kv_cache_bytes or 256 << 20, "block_size": 32}
    else:
        engine |= {"gpu_memory_utilization": config.gpu_memory_utilization}
    if config.lora:
        engine |= {"enable_lora": True, "max_lora_rank": config.lora.max_rank, "max_loras": config.lora.max_loras,
                   "lora_target_modules": list(config.lora.targets)}  # fmt: skip
    job = {"engine": engine, "prompts": ids, "tokens": options.tokens, "repeat": options.repeat,
           "adapter": str(options.adapter) if options.adapter else None}  # fmt: skip
    (scratch / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("rollouts_offline.py")
    extra = {
        "PYTHONPATH": str(runtime.plugin_path),
        "VLLM_PLUGINS": "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if runtime.kind == "cpu":
        extra |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    command = [str(runtime.python), str(script), str(scratch / "job.json"), str(scratch / "offline.json")]
    subprocess.run(command, env=child_env(extra), check=True)
    return json.loads((scratch / "offline.json").read_text())


def table(lockstep: dict[str, Any], alone: dict[str, Any] | None) -> None:
    print("tokens  lockstep tok/s  offline  share  offline+logprobs  share  CPU seconds of the last round")
    for tokens, result in lockstep.items():
        rate = statistics.median(result["tokens_per_second"])
        line = f"{tokens:>6} {rate:>15.0f}"
        for kind in ("plain", "logprobs"):
            other = statistics.median(alone[kind][tokens]) if alone else float("nan")
            line += f" {other:>8.0f} {rate / other:>6.2f}"
        print(line, result["cpu_seconds"][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; the default is a tiny Qwen3")
    parser.add_argument("--adapter", type=Path, help="a PEFT folder that all requests use")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128, 512])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=512, help="sequences that a server takes at once")
    parser.add_argument(
        "--replicas", type=int, default=1, help="servers that share the requests, each on a GPU of its own"
    )
    parser.add_argument("--server-arg", action="append", default=[])
    parser.add_argument("--no-offline", action="store_true")
    parser.add_argument("--alone", action="store_true", help="each request by itself, as requests with no siblings are")
    parser.add_argument("--tiny", action="store_true", help="few requests and a tiny model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.requests, options.tokens, options.repeat, options.sequences = 64, [8, 32], 2, 64
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            folder = Path(scratch) / "tiny"
            write_tiny("qwen3", folder, seed=0)
        runtime = find_runtime(default_kind())
        targets = get_model_support_spec(str(folder)).default_target_modules
        lora = LoraServing(max_rank=RANK, targets=targets) if options.adapter else None
        config = ServerConfig(
            model=folder,
            served_name="base",
            dtype="bfloat16" if runtime.kind == "cuda" else "float32",
            lora=lora,
            max_model_len=1024,
            max_num_seqs=options.sequences,
            extra_args=tuple(options.server_arg),
        )
        result = asyncio.run(through_lockstep(config, runtime, Path(scratch), options))
        alone = None if options.no_offline else offline(config, runtime, Path(scratch), options)
    table(result, alone)
    if options.output:
        options.output.write_text(json.dumps({"lockstep": result, "offline": alone}, indent=1) + "\n")


if __name__ == "__main__":
    main()
