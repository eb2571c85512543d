"""Questions with one reply each, and a function that scores it."""

from __future__ import annotations

import inspect
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.loop.task import Task
from lockstep.rollouts.trajectory import Trajectory

if TYPE_CHECKING:
    from lockstep.model import TrainableModel

Score = Callable[[str, Any], float | Awaitable[float]]
"""From what the model said, and the question's own data, to a reward. It sees nothing else of the conversation."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    messages: the conversation up to the reply.
    data: what the scoring function gets with the reply.
    shown: a right reply, for demonstrations; None where none is known.
    """

    messages: Sequence[Mapping[str, Any]]
    data: Any
    shown: str | None = None


def question_task(
    path: Path, questions: list[Question], held_out: list[Question], score: Score, reply_tokens: int
) -> Task:
    """The task of these questions. A scoring function that raises is a failed rollout with its traceback.

    held_out: evaluated, and never trained on; empty: the questions are evaluated.
    """

    async def rollout(model: TrainableModel, scenario: Question, temperature: float) -> Trajectory:
        completion = await model.openai_client().chat.completions.create(
            model=model.inference_name(),
            messages=[dict(message) for message in scenario.messages],  # type: ignore[arg-type]
            temperature=temperature,
            max_tokens=reply_tokens,
        )
        choice = completion.choices[0]
        reward = await reward_of(score, choice.message.content or "", scenario.data)
        return Trajectory(messages_and_choices=[*scenario.messages, choice], reward=reward)

    shown = [question for question in questions if question.shown is not None]
    return Task(path, questions, rollout, _demonstrations(shown) if shown else None, held_out)


async def reward_of(score: Score, text: str, data: Any) -> float:
    """What the scoring function says. Raises TypeError where that is no number."""
    reward = score(text, data)
    if inspect.isawaitable(reward):
        reward = await reward
    try:
        return float(reward)
    except (TypeError, ValueError):
        raise TypeError(f"the scoring function returned {reward!r}, which is no number") from None


def _demonstrations(questions: list[Question]) -> Callable[[random.Random], list[dict[str, Any]]]:
    """What a tiny model learns first: the form of a reply, and half of the time the right one."""

    def demonstrations(rng: random.Random) -> list[dict[str, Any]]:
        shown = []
        for question in questions[:400]:
            said = question if rng.random() < 0.5 else rng.choice(questions)
            messages = [*map(dict, question.messages), {"role": "assistant", "content": said.shown}]
            shown.append({"messages": messages})
        return shown

    return demonstrations
