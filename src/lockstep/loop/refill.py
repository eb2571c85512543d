"""Groups whose rewards are all equal teach nothing: others take their place (dynamic sampling, DAPO,
arXiv 2503.14476).
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.batching.advantages import equal_rewards
from lockstep.errors import RolloutError

if TYPE_CHECKING:
    from lockstep.loop.task import Task
    from lockstep.rollouts.trajectory import TrajectoryGroup

LEFT_OUT = "left_out"
"""The key of a group's metadata that says why the group is not trained on."""


def further_scenarios(task: Task, limit: int, seed: int, step: int) -> list[Any]:
    """What a step may draw beyond its own scenarios: of an order of its own, which depends on (seed,
    step) alone, so that a resumed run draws the same.
    """
    return task.draw(limit, zlib.crc32(f"{seed} refill".encode()), step)


async def refilled(
    groups: Sequence[TrajectoryGroup],
    further: Sequence[Any],
    gather: Callable[[Sequence[Any], int], Awaitable[list[TrajectoryGroup]]],
    eps: float,
) -> list[TrajectoryGroup]:
    """The groups, where each with equal rewards has made place for a further one whose rewards differ,
    as far as `further` goes. The groups that made place, or found none, follow, marked `LEFT_OUT`.

    gather: of some scenarios, in the round of that number (the first is 1).
    eps: rewards that differ by at most this share of the largest |reward| are equal.

    Raises RolloutError, with all groups so far, where `gather` does.
    """
    kept, spare, used, number = list(groups), [], 0, 0
    while (quiet := [place for place, group in enumerate(kept) if is_quiet(group, eps)]) and used < len(further):
        drawn = further[used : used + len(quiet)]
        used, number = used + len(drawn), number + 1
        try:
            gathered = await gather(drawn, number)
        except RolloutError as error:  # what was gathered before stays on disk with the rest
            raise RolloutError(str(error), [*kept, *spare, *error.groups]) from error
        for group in gathered:
            if is_quiet(group, eps):
                spare.append(group)
            else:
                place = quiet.pop(0)
                spare.append(kept[place])
                kept[place] = group
    return kept + [
        group.model_copy(update={"metadata": group.metadata | {LEFT_OUT: "equal rewards"}}) for group in spare
    ]


def is_quiet(group: TrajectoryGroup, eps: float) -> bool:
    """Whether the group has no two rewards that differ."""
    rewards = np.array([trajectory.reward for trajectory in group.trajectories])
    return len(rewards) < 2 or equal_rewards(rewards, eps)
