"""A small run of the Megatron backend, as the stages with a trainer and a server need it.

A model that was made here has random weights and no words: its rewards are about classes of token
ids. Shapes: T tokens of a probe.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import lockstep as ls
from lockstep.validate.request import Request

PROMPTS = tuple(
    f"Answer about {thing}." for thing in ("rain", "salt", "a river", "the moon", "iron", "a bee", "snow", "tea")
)
_LENGTH = 1024
Reward = Callable[[Any], float]


@dataclass
class Steps:
    """The course of a run: rewards of each step's rollouts, and of greedy replies."""

    sampled: list[float] = field(default_factory=list)
    greedy: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@asynccontextmanager
async def opened(request: Request, mode: str) -> AsyncIterator[tuple[Any, Any]]:
    """(backend, model registered with it); both end with the block. mode: "lora" or "merged"."""
    settings: dict[str, Any] = {"dtype": request.dtype} if request.dtype else {}
    backend = ls.MegatronBackend(
        request.folder / "runs",
        rollout_weights_mode=mode,
        max_model_len=_LENGTH,
        seed=request.seed,
        server_args=request.server_args,
        **settings,
    )
    backend.on_progress = request.say
    model = ls.TrainableModel(
        name="checked", project="validate", base_model=str(request.base_model), lora=ls.LoraConfig(rank=8, alpha=16)
    )
    try:
        await model.register(backend)
        yield backend, model
    finally:
        await backend.close()


async def rollouts(
    model: Any,
    tries: int,
    reward: Reward,
    tokens: int,
    prompts: Sequence[str] = PROMPTS,
    temperature: float = 1.0,
    **extra: Any,
) -> list[Any]:
    """A group for each prompt. extra: further fields of the request's body."""

    async def attempt(text: str) -> Any:
        messages = [{"role": "user", "content": text}]
        completion = await model.openai_client().chat.completions.create(
            model=model.inference_name(),
            messages=messages,
            max_tokens=tokens,
            temperature=temperature,
            extra_body=extra,
        )
        choice = completion.choices[0]
        return ls.Trajectory(messages_and_choices=[*messages, choice], reward=reward(choice))

    async def group(text: str) -> Any:
        return ls.TrajectoryGroup(trajectories=await asyncio.gather(*(attempt(text) for _ in range(tries))))

    return await asyncio.gather(*(group(text) for text in prompts))


def rewards_of(groups: list[Any]) -> np.ndarray:
    """Rewards by group and trajectory."""
    return np.array([[trajectory.reward for trajectory in group.trajectories] for group in groups])


async def learn(
    backend: Any,
    model: Any,
    config: Any,
    reward: Reward,
    *,
    steps: int,
    tries: int,
    tokens: int,
    enough: Callable[[Steps], bool],
    say: Callable[[str], None],
    prompts: Sequence[str] = PROMPTS,
    **extra: Any,
) -> Steps:
    """Train until `enough`, or for `steps` steps."""
    course = Steps()
    for number in range(steps + 1):
        greedy = rewards_of(await rollouts(model, 1, reward, tokens, prompts, 0.0, **extra))
        course.greedy.append(float(greedy.mean()))
        say(f"step {number}: greedy reward {course.greedy[-1]:.3f}")
        if number == steps or enough(course):
            return course
        groups = await rollouts(model, tries, reward, tokens, prompts, **extra)
        rewards = rewards_of(groups)
        course.sampled.append(float(rewards.mean()))
        course.spread.append(float(rewards.std(axis=1).max()))
        result = await backend.train(model, groups, config)
        course.norms.append(float(result.metrics["grad_norm"]))
    return course
