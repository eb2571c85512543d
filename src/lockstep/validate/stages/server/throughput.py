"""Stage throughput: trainer and server by themselves, and the whole loop, on the same prompts and
the same batch.

Speeds have no limits, since they are the machine's. What has limits is what a fast loop must not
do: leave out tokens, or compile kernels in steps after the first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import lockstep as ls
from lockstep.backends.megatron.packed_file import packed_groups
from lockstep.config import deadlines
from lockstep.trainer.protocol import TrainStep
from lockstep.validate.figures import Figure, Outcome, count, judged
from lockstep.validate.request import Request
from lockstep.validate.stages.server.served_run import opened, rollouts

_WARM = 1
_SIZES = {"cpu": (2, 2, 16), "cuda": (8, 3, 64)}
"""By device: replies to a prompt, measured steps and repeats, tokens of a reply."""
RATE = "tokens/s"
_PARTS = ("seconds_train", "seconds_sync", "seconds_verify", "seconds_publish")


async def run(request: Request) -> Outcome:
    """See the module."""
    config = ls.TrainConfig(learning_rate=1e-4, max_mismatch=None)
    tries, repeats, tokens = _SIZES[request.device]
    steps: list[dict[str, float]] = []
    async with opened(request, "lora") as (backend, model):
        live = backend.run_info(model)
        for number in range(_WARM + repeats):
            request.say(f"step {number + 1} of {_WARM + repeats}")
            started = time.monotonic()
            groups = await rollouts(model, tries, _reward, tokens)
            sampled_s, sampled = time.monotonic() - started, _sampled(groups)
            result = await backend.train(model, groups, config)
            whole_s = time.monotonic() - started
            own = {"sampled_s": sampled_s, "sampled": sampled, "whole_s": whole_s}
            steps.append({**result.metrics, **own})
        request.say("the server by itself")
        served: list[float] = []
        groups: list[Any] = []
        for _ in range(repeats):
            started = time.monotonic()
            groups = await rollouts(model, tries, _reward, tokens)
            served.append(_sampled(groups) / (time.monotonic() - started))
        request.say("the trainer by itself")
        config = config.at_step(model.step + 1)
        batch = await packed_groups(live, groups, config)
        await live.gpus.give_to_trainer(forget_weights=live.delivery.replaces)
        trained = []
        for _ in range(repeats):
            answer = await live.trainer.call(TrainStep(batch.path, config, out=None), deadline_s=deadlines.STEP_S)
            trained.append(answer.metrics["tokens_per_second"])
    return judged([*_loop(steps[_WARM:]), *_isolated(served, trained)], _notes(steps))


def _loop(steps: Sequence[Mapping[str, float]]) -> list[Figure]:
    """Figures of whole steps."""
    seconds = sum(step["whole_s"] for step in steps)
    parts = sum(step["sampled_s"] + sum(step.get(part, 0.0) for part in _PARTS) for step in steps)
    lost = sum(abs(step["sampled"] - step["tokens_sampled"]) for step in steps)
    sampled = sum(step["sampled"] for step in steps)
    trained = sum(step["tokens_computed"] for step in steps)
    busy = sum(step["tokens_computed"] / step["tokens_per_second"] for step in steps)
    return [
        count("sampled tokens that are not trained on", lost),
        count("kernels compiled after the first step", sum(step.get("compilations", 0.0) for step in steps)),
        count("loop: sampled tokens", sampled / seconds, None, unit=RATE),
        count("loop: trained tokens", trained / seconds, None, unit=RATE),
        count("loop: server while it samples", sampled / sum(step["sampled_s"] for step in steps), None, unit=RATE),
        count("loop: trainer while it computes", trained / busy, None, unit=RATE),
        count("loop: share of time outside of its parts", 1 - parts / seconds, None),
    ]


def _isolated(served: Sequence[float], trained: Sequence[float]) -> list[Figure]:
    """The medians of the repeats."""
    return [
        count("server by itself", sorted(served)[len(served) // 2], None, unit=RATE),
        count("trainer by itself", sorted(trained)[len(trained) // 2], None, unit=RATE),
    ]


def _notes(steps: Sequence[Mapping[str, float]]) -> list[str]:
    measured = steps[_WARM:]
    parts = {"rollouts": "sampled_s"} | {part.removeprefix("seconds_"): part for part in _PARTS}
    shares = (f"{name} {sum(step.get(key, 0.0) for step in measured):.2f} s" for name, key in parts.items())
    return [f"{len(measured)} steps after {_WARM} to warm up: {', '.join(shares)}"]


def _sampled(groups: Sequence[Any]) -> int:
    choices = (trajectory.messages_and_choices[-1] for group in groups for trajectory in group.trajectories)
    return sum(len(choice.token_ids) for choice in choices)


def _reward(choice: Any) -> float:
    """Something that differs between replies: their tokens' ids."""
    return sum((index + 1) * token % 97 for index, token in enumerate(choice.token_ids)) / 1000
