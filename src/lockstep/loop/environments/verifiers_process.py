"""A verifiers environment in a process of its own, which may have other packages than Lockstep's.

Runs as a file (`python -P verifiers_process.py`), and needs the package verifiers alone. It reads one JSON object a line:
first `{"env": ..., "tasks": n}`, then one a rollout. It answers in the same way, on what was its standard output.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from typing import Any, TextIO


def _say(out: TextIO, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


async def _serve(out: TextIO) -> None:
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config

    begin = json.loads(sys.stdin.readline())
    env = load_environment(resolve_env_config(begin["env"]))
    tasks = list(env.taskset.take(begin["tasks"]))
    _say(out, {"tasks": len(tasks)})
    running: set[asyncio.Task[None]] = set()
    async with env.serving():
        while line := await asyncio.to_thread(sys.stdin.readline):
            task = asyncio.ensure_future(_answered(env, tasks, json.loads(line), out))
            running.add(task)
            task.add_done_callback(running.discard)


async def _answered(env: Any, tasks: list[Any], asked: dict[str, Any], out: TextIO) -> None:
    try:
        answer = await _run(env, tasks[asked["task"]], asked)
    except Exception as error:  # noqa: BLE001  whatever the environment raises is its rollout's failure
        answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    _say(out, {"rollout": asked["rollout"], **answer})


async def _run(env: Any, task: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """One episode: its reward is the sum of its traces' rewards."""
    from verifiers.v1.clients import ModelContext
    from verifiers.v1.configs.client import EvalClientConfig
    from verifiers.v1.types import SamplingConfig

    variable = f"LOCKSTEP_EPISODE_{asked['rollout']}"
    os.environ[variable] = asked["api_key"]
    try:
        client = EvalClientConfig(base_url=asked["base_url"], api_key_var=variable)
        context = ModelContext(model=asked["model"], client=client, sampling=SamplingConfig(**asked["sampling"]))
        (slot,) = env.slots(task)
        episode = await env.run_slot(slot, context)
    finally:
        del os.environ[variable]
    failures = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if failures or not episode.ok:
        last = failures[-1] if failures else None
        said = f"{last.type}: {last.message}" if last else "the episode is not ok and names no error"
        return {"error": said, "traceback": (last.traceback if last else None) or said}
    rewards = {name: reward.score for trace in episode.traces for name, reward in trace.rewards.items()}
    return {"reward": sum(trace.reward for trace in episode.traces), "metrics": rewards}


def main() -> None:
    """Serve until standard input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the environment prints does not mix with answers
    asyncio.run(_serve(out))


if __name__ == "__main__":
    main()
