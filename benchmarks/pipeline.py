"""The pipeline against the synchronous loop where one rollout in eight is slow.

    python benchmarks/pipeline.py --tiny                                                           # CPU, some ten minutes
    python benchmarks/pipeline.py --model DIR --slow tokens --short 128 --groups 16 --group-size 8 --rate 1e-4 \\
        --output benchmarks/results/NAME.json                                                      # two GPUs

Both loops train the same number of groups with the same settings, the pipeline with `max_steps_off_policy` of `--bound`.
The clock runs from the first rollout to the last step, the evaluations before and after included; `steady` figures are
of the time from the first step's groups to the last one's. One rollout in eight is slow: with `--slow pause` it waits
`--pause` seconds, as for a tool; with `--slow tokens` its reply is ten times as long.

The reward is the share of sampled tokens with an even id, which a model of random weights learns as well. `reward` is of
the last four steps' rollouts, which the pipeline sampled up to `--bound` steps earlier than the synchronous loop;
`final_reward` is of the last checkpoint's own answers, sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lockstep as ls
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.loop.evaluation import mean_reward, sample
from lockstep.loop.run_file import TaskSection
from lockstep.loop.synchronous import run
from lockstep.loop.task import Task
from lockstep.models.tiny.write import write_tiny

LONGER = 10
"""A long reply has so many times the tokens of a short one."""
IN = 8
"""One rollout in so many is slow."""
SCENARIOS = [f"Write the word number {number}." for number in range(64)]


def rollouts(slow: str, pause_s: float, short: int) -> Callable[..., Any]:
    numbers = itertools.count()

    async def rollout(model: ls.TrainableModel, scenario: str, temperature: float) -> ls.Trajectory:
        is_slow = temperature > 0 and next(numbers) % IN == IN - 1
        messages: list[Any] = [{"role": "user", "content": scenario}]
        reply = await model.openai_client().chat.completions.create(
            model=model.inference_name(),
            messages=messages,
            temperature=temperature,
            max_tokens=short * (LONGER if is_slow and slow == "tokens" else 1),
            extra_body={"ignore_eos": True},
        )
        if is_slow and slow == "pause":
            await asyncio.sleep(pause_s)
        choice: Any = reply.choices[0]
        even = sum(token % 2 == 0 for token in choice.token_ids) / len(choice.token_ids)
        return ls.Trajectory(messages_and_choices=[*messages, choice], reward=even)

    return rollout


async def trained_run(base: Path, scratch: Path, mode: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run from step 0: its seconds, rewards and waits."""
    context = max(512, options.short * LONGER + 256)
    backend = MegatronBackend(path=scratch / "runs", max_model_len=context, seed=seed, server_args=options.server_arg)
    model = ls.TrainableModel(
        name=f"{mode}-{seed}", project="benchmark", base_model=str(base), lora=ls.LoraConfig(rank=16, alpha=32)
    )
    rollout, bound = rollouts(options.slow, options.pause, options.short), options.bound if mode == "pipeline" else 0
    config = ls.TrainConfig(learning_rate=options.rate, max_steps_off_policy=bound)
    settings: dict[str, Any] = {
        "steps": options.steps,
        "groups_per_step": options.groups,
        "group_size": options.group_size,
        "evaluate_every": options.steps,
        "evaluate_scenarios": 8,
        "seed": seed,
    }
    section = TaskSection(file="", **settings)
    try:
        await model.register(backend)
        started = time.perf_counter()
        advice = None
        if mode == "pipeline":
            trainer = ls.PipelineTrainer(
                model, backend, rollout=rollout, scenarios=SCENARIOS, config=config, **settings
            )
            await trainer.run()
            advice = trainer.advice
        else:
            task = Task(Path(), list(SCENARIOS), rollout, None)
            await run(model, backend, task, section, config, backend.run_path(model), lambda row: None)
        seconds = time.perf_counter() - started
        quick = Task(Path(), list(SCENARIOS), rollouts("none", 0, options.short), None)
        every = section.model_copy(update={"evaluate_scenarios": len(SCENARIOS), "evaluate_samples": 2})
        final = mean_reward(await sample(model, quick, every, lambda group, trajectory: None))
        metrics = backend.run_info(model).store.metrics()
        taken = [file.stat().st_mtime for file in sorted((backend.run_path(model) / "trajectories/train").iterdir())]
    finally:
        await backend.close()
    steps = [metrics[step] for step in range(1, options.steps + 1)]
    tokens = sum(step["tokens_sampled"] for step in steps)
    steady_s = taken[-1] - taken[0]
    return {
        "mode": mode,
        "seed": seed,
        "seconds": seconds,
        "trained_groups": sum(step["groups"] for step in steps),
        "trained_tokens_per_second": tokens / seconds,
        "steady_tokens_per_second": sum(step["tokens_sampled"] for step in steps[:-1]) / steady_s,
        "reward": statistics.mean(step["reward"] for step in steps[-4:]),
        "final_reward": final,
        "rewards": [step["reward"] for step in steps],
        "steps_off_policy": [step["steps_off_policy"] for step in steps],
        "groups_stale": sum(step.get("groups_stale", 0.0) for step in steps),
        "groups_overtaken": statistics.mean(step.get("groups_overtaken", 0.0) for step in steps),
        "trainer_idle": sum(step["wait_for_rollouts"] for step in steps) / seconds if advice else None,
        "steady_trainer_idle": sum(step["wait_for_rollouts"] for step in steps[1:]) / steady_s if advice else None,
        "rollouts_held_back": sum(step["wait_for_trainer"] for step in steps) / seconds if advice else None,
        "seconds_train": sum(step["seconds_train"] for step in steps),
        "verified": all(step["verified_identity"] == 1 for step in steps),
        "advice": advice,
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The pipeline over the synchronous loop: wall time, trained tokens by the second, and reward with its error."""
    by_mode = {mode: [run for run in results if run["mode"] == mode] for mode in ("synchronous", "pipeline")}
    pairs = list(zip(by_mode["synchronous"], by_mode["pipeline"], strict=True))
    return {
        "wall_time_ratio": [piped["seconds"] / plain["seconds"] for plain, piped in pairs],
        "tokens_per_second_ratio": [
            piped["trained_tokens_per_second"] / plain["trained_tokens_per_second"] for plain, piped in pairs
        ],
        "steady_tokens_per_second_ratio": [
            piped["steady_tokens_per_second"] / plain["steady_tokens_per_second"] for plain, piped in pairs
        ],
        "reward_difference": _difference(pairs, "reward"),
        "final_reward_difference": _difference(pairs, "final_reward"),
    }


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], name: str) -> dict[str, float | None]:
    """Of the pipeline from the synchronous loop: the mean over seeds and its standard error."""
    values = [piped[name] - plain[name] for plain, piped in pairs]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_error": error}


async def main(options: argparse.Namespace) -> None:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pipeline-benchmark-") as folder:
        base = options.model
        if options.tiny:
            shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
            base = write_tiny("qwen3", Path(folder) / "tiny", seed=5, overrides=shape)
        for seed in options.seeds:
            for mode in ("synchronous", "pipeline"):
                results.append(await trained_run(base, Path(folder), mode, seed, options))
                print(json.dumps(results[-1]), flush=True)
    report = {"options": {name: str(value) for name, value in vars(options).items()}, "runs": results}
    report["summary"] = summary(results)
    print(json.dumps(report["summary"], indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    which.add_argument("--model", type=Path, help="a folder")
    parser.add_argument("--slow", choices=("pause", "tokens"), default="pause")
    parser.add_argument("--pause", type=float, default=6.0, help="seconds of a slow rollout")
    parser.add_argument("--short", type=int, default=16, help="tokens of a short reply")
    parser.add_argument("--server-arg", action="append", default=[], help="a further argument of vLLM's command line")
    parser.add_argument("--bound", type=int, default=2, help="max_steps_off_policy of the pipeline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--groups", type=int, default=4, help="groups per step")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path)
    asyncio.run(main(parser.parse_args()))
