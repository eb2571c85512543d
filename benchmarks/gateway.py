"""What the gateway costs: agents in another process, through episodes and straight to the server.

    python benchmarks/gateway.py --model SMOLLM2 --shape qwen3-8b --output benchmarks/results/h200_gateway.json   # one GPU
    python benchmarks/gateway.py --tiny                                                                             # CPU, about two minutes

Each of `--sessions` agents holds a conversation of `--turns` turns with replies of a fixed length (`ignore_eos`), as plain
HTTP from one process beside this one. `direct` asks the run's server, `episodes` the gateway, `streamed` the gateway with
streams. Wall time is from the first request to the last reply. CPU is of the gateway's own thread, a call. The ways take
turns, `--repeat` times or until `--budget` seconds after the start, each time in another order and with new conversations.
The overhead is the mean of the rounds' ratios, with its standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_random

from lockstep.backends.base import Endpoint
from lockstep.gateway.calls import Terms
from lockstep.gateway.server import Gateway
from lockstep.inference.client import Server
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.environment.locate import default_kind
from lockstep.inference.launch import ServerConfig, launch
from lockstep.models.tiny.write import write_tiny
from lockstep.process.child import child_env

STARTED = time.monotonic()
WAYS = ("direct", "episodes", "streamed")


async def talk(client: Any, session: dict[str, Any], plan: dict[str, Any]) -> None:
    """One agent's conversation."""
    messages = [{"role": "user", "content": f"[{plan['round']}/{session['number']}] Tell me a story."}]
    headers = {"Authorization": f"Bearer {session['key']}"}
    for turn in range(plan["turns"]):
        body = {"model": session["model"], "messages": messages, "max_tokens": plan["tokens"], "ignore_eos": True}
        text = ""
        if plan["stream"]:
            async with client.stream("POST", session["url"], json={**body, "stream": True}, headers=headers) as reply:
                assert reply.status_code == 200, await reply.aread()
                for line in (await reply.aread()).split(b"\n"):
                    if line.startswith(b"data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            text += choice["delta"].get("content") or ""
        else:
            reply = await client.post(session["url"], json=body, headers=headers)
            assert reply.status_code == 200, reply.text
            text = reply.json()["choices"][0]["message"]["content"] or ""
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And then, {turn}?"}]


async def talk_all(plan: dict[str, Any]) -> float:
    """All agents at once; seconds from the first request to the last reply."""
    import httpx

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(trust_env=False, timeout=600, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(talk(client, session, plan) for session in plan["sessions"]))
        return time.perf_counter() - started


def gateway_seconds() -> float:
    """CPU seconds of the gateway's thread so far."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "lockstep-gateway")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def one_round(way: str, round_: int, server: Server, gateway: Gateway, options: argparse.Namespace) -> dict[str, float]:
    """Wall seconds, and the gateway's CPU milliseconds a call."""
    endpoint = Endpoint(server.base_url, server.api_key, options.sessions, options.max_model_len)
    episodes = [] if way == "direct" else [
        gateway.episode(Terms("agent@0", lambda: endpoint), lambda: None) for _ in range(options.sessions)
    ]  # fmt: skip
    sessions = [
        {"number": n, "model": "agent@0", "url": f"{target.base_url}/chat/completions", "key": target.api_key}
        for n, target in enumerate(episodes or [endpoint] * options.sessions)
    ]
    plan = {"sessions": sessions, "turns": options.turns, "tokens": options.tokens, "stream": way == "streamed"}
    before = gateway_seconds()
    agents = subprocess.run(
        [sys.executable, __file__, "--agents"],
        input=json.dumps(plan | {"round": f"{way} {round_}"}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=child_env({}),
    )
    cpu_ms = (gateway_seconds() - before) / (options.sessions * options.turns) * 1e3
    for episode in episodes:
        trajectory = episode.trajectory(reward=0.0)
        assert len(trajectory.choices) == options.turns, trajectory.metadata
        assert not trajectory.metadata["episode"]["forks"]
    return {"seconds": float(agents.stdout), "cpu_ms_a_call": cpu_ms}


async def measure(config: ServerConfig, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    server = await launch(config, find_runtime(default_kind()), scratch, lambda line: print(line, flush=True))
    gateway = Gateway()
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for round_ in range(options.repeat + 1):
            if round_ > 1 and time.monotonic() - STARTED > options.budget:
                break
            for way in WAYS[round_ % 3 :] + WAYS[: round_ % 3]:
                measured = await asyncio.to_thread(one_round, way, round_, server, gateway, options)
                if round_:  # the first compiles and connects
                    rounds[way].append(measured)
                    print(way, {name: round(value, 3) for name, value in measured.items()}, flush=True)
    finally:
        gateway.close()
        await server.close()
    ratios = {
        way: [
            through["seconds"] / direct["seconds"] - 1
            for through, direct in zip(rounds[way], rounds["direct"], strict=True)
        ]
        for way in WAYS[1:]
    }
    return {
        "rounds": rounds,
        "overhead_of_wall": {way: statistics.mean(ratios[way]) for way in ratios},
        "standard_error": {
            way: statistics.stdev(ratios[way]) / len(ratios[way]) ** 0.5 for way in ratios if len(ratios[way]) > 1
        },
        "cpu_ms_a_call": {
            way: statistics.median(measured["cpu_ms_a_call"] for measured in rounds[way]) for way in WAYS[1:]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, with the model's tokenizer")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1800.0)
    parser.add_argument("--server-arg", action="append", default=[])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.agents:
        print(asyncio.run(talk_all(json.loads(sys.stdin.read()))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiny:
            options.model = write_tiny("qwen3", Path(scratch) / "model")
            options.tokens, options.repeat, options.turns = 16, 2, 3
        if options.shape:
            from transformers import AutoTokenizer

            known = AutoTokenizer.from_pretrained(options.model)  # a random model's tokens must have text, too
            vocabulary = {"vocab_size": math.ceil(len(known) / 128) * 128}
            options.model = write_random(options.shape, Path(scratch) / "model", vocabulary)
            known.save_pretrained(options.model)
        on_cpu = default_kind() == "cpu"
        options.max_model_len = 512 if options.tiny else 4096
        config = ServerConfig(
            model=options.model,
            served_name="agent@0",
            dtype="float32" if on_cpu else "bfloat16",
            max_model_len=options.max_model_len,
            max_num_seqs=options.sessions,
            extra_args=tuple(options.server_arg),
        )
        result = asyncio.run(measure(config, Path(scratch), options))
    asked = {name: getattr(options, name) for name in ("sessions", "turns", "tokens", "repeat")}
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))
    if options.output:
        options.output.write_text(
            json.dumps({"asked": asked, "model": options.shape or str(options.model), **result}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
