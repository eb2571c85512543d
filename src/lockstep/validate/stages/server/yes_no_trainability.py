"""Stage yes_no_trainability: a reward on the first word is learnt within a few steps.

"maybe" earns 1, "no" 0.75, "yes" 0.5. A model of random weights has no words: three classes of token
ids, by the remainder of a division by 3, stand for them.
"""

from __future__ import annotations

import re
from typing import Any

import lockstep as ls
from lockstep.validate.figures import Outcome, count, judged
from lockstep.validate.request import Request
from lockstep.validate.stages.server.served_run import Steps, learn, opened

_ENOUGH = 0.9
_STEPS = 16
_WORDS = {"maybe": 1.0, "no": 0.75, "yes": 0.5}


def word_reward(choice: Any) -> float:
    """By the reply's first word."""
    words = re.findall(r"[a-z]+", (choice.message.content or "").lower())
    return _WORDS.get(words[0], 0.0) if words else 0.0


def class_reward(choice: Any) -> float:
    """By the id of the reply's first token."""
    return (1.0, 0.75, 0.5)[choice.token_ids[0] % 3]


async def run(request: Request) -> Outcome:
    """See the module."""
    rate = 5e-3 if request.random else 1e-4
    config = ls.TrainConfig(learning_rate=rate, max_mismatch=None)
    async with opened(request, "lora") as (backend, model):
        course = await learn(
            backend, model, config, class_reward if request.random else word_reward,
            steps=_STEPS, tries=8, tokens=1 if request.random else 4, enough=_reached, say=request.say,
        )  # fmt: skip
    return judged_course(course, _ENOUGH)


def _reached(course: Steps) -> bool:
    return course.greedy[-1] >= _ENOUGH and len(course.greedy) > 1


def judged_course(course: Steps, enough: float) -> Outcome:
    """Passed if the reward rose to `enough`, or stayed above it under gradients that were not 0."""
    rose = course.greedy[-1] - course.greedy[0]
    figures = [
        count("greedy reward short of the target", max(0.0, enough - course.greedy[-1])),
        count("rewards that never differed", int(max(course.spread, default=0.0) == 0)),
        count("steps without a gradient", int(max(course.norms, default=0.0) == 0)),
        count("greedy reward at the end", course.greedy[-1], None),
        count("rise of the greedy reward", rose, None),
    ]
    return judged(
        figures, [f"{len(course.norms)} steps"], {"reward": {"greedy": course.greedy, "sampled": course.sampled}}
    )
