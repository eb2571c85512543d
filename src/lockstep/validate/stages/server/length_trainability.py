"""Stage length_trainability: the length of replies is learnt from a reward that the prompt does not
name.

The reward is -|n - target| / target of n tokens. A model of random weights never ends a turn, so
its reply ends at a token whose id is a multiple of 8.
"""

from __future__ import annotations

from typing import Any

import lockstep as ls
from lockstep.models.registry import load_model_config
from lockstep.validate.figures import Outcome, count, judged
from lockstep.validate.request import Request
from lockstep.validate.stages.server.served_run import PROMPTS, Steps, learn, opened

_STEPS = 20
_CLOSE = 0.35
"""Mean |n - target| / target that is asked for at the end."""
_CLASS = 8


async def run(request: Request) -> Outcome:
    """See the module."""
    target, most = (2, 8) if request.random else (10, 48)

    def reward(choice: Any) -> float:
        return -abs(len(choice.token_ids) - target) / target

    extra: dict[str, Any] = {}
    if request.random:
        rows = load_model_config(str(request.base_model)).vocab_size
        extra = {"stop_token_ids": list(range(0, rows, _CLASS))}
    config = ls.TrainConfig(learning_rate=5e-3 if request.random else 1e-4, max_mismatch=None)

    def close(course: Steps) -> bool:
        return bool(course.sampled) and course.sampled[-1] >= -_CLOSE

    async with opened(request, "lora") as (backend, model):
        course = await learn(
            backend,
            model,
            config,
            reward,
            steps=_STEPS,
            tries=8,
            tokens=most,
            enough=close,
            say=request.say,
            prompts=PROMPTS[:4] if request.random else PROMPTS,
            **extra,
        )
    first, last = -course.sampled[0], -max(course.sampled)
    figures = [
        count("mean |length - target| / target of the best step", last, _CLOSE),
        count("share of the first step's error that is left", last / max(first, 1e-9), 0.7),
        count("rewards that never differed", int(max(course.spread, default=0.0) == 0)),
        count("mean |length - target| / target of the first step", first, None),
    ]
    return judged(
        figures, [f"target {target} tokens, {len(course.norms)} steps"], {"reward": {"sampled": course.sampled}}
    )
