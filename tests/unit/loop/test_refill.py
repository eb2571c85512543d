"""Groups with equal rewards make place for others, up to a limit, and a resumed run draws the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lockstep.loop.refill import LEFT_OUT, further_scenarios
from lockstep.loop.run_file import TaskSection
from lockstep.loop.synchronous import roll_out
from lockstep.loop.task import Task
from lockstep.rollouts.trajectory import Trajectory


class Attempts:
    """A rollout whose rewards differ for odd scenarios alone. No model is asked."""

    def __init__(self) -> None:
        self.tried: list[int] = []

    async def rollout(self, model: Any, scenario: int, temperature: float) -> Trajectory:
        self.tried.append(scenario)
        reward = float(self.tried.count(scenario) % 2) if scenario % 2 else 1.0
        return Trajectory(messages_and_choices=[{"role": "user", "content": str(scenario)}], reward=reward)


class NoModel:
    """`gather` takes no lease on rollouts that ask nobody."""


async def rolled(scenarios: list[int], refill: int, step: int = 0) -> tuple[list[int], list[int], Attempts]:
    """(scenarios trained on, scenarios left out, what was tried)."""
    attempts = Attempts()
    task = Task(Path("task.py"), scenarios, attempts.rollout, None)
    section = TaskSection(file="task.py", steps=9, groups_per_step=4, group_size=2, seed=3, refill_groups=refill)
    groups = await roll_out(NoModel(), task, section, step)  # pyright: ignore[reportArgumentType]
    number = [int(group.trajectories[0].messages_and_choices[0]["content"]) for group in groups]
    out = [LEFT_OUT in group.metadata for group in groups]
    assert out == sorted(out)  # what is trained on comes first
    return (
        [n for n, left in zip(number, out, strict=True) if not left],
        [n for n, left in zip(number, out, strict=True) if left],
        attempts,
    )


async def test_a_step_is_filled_with_groups_that_differ():
    scenarios = list(range(40))
    trained, left_out, attempts = await rolled(scenarios, refill=40)
    assert len(trained) == 4
    assert all(scenario % 2 for scenario in trained)
    assert left_out
    assert not any(scenario % 2 for scenario in left_out)
    assert len(attempts.tried) == 2 * (len(trained) + len(left_out))
    again = await rolled(scenarios, refill=40)
    assert again[:2] == (trained, left_out)
    assert (await rolled(scenarios, refill=40, step=1))[0] != trained


@pytest.mark.parametrize("limit", [0, 3])
async def test_the_limit_holds_where_nothing_differs(limit):
    trained, left_out, attempts = await rolled([0, 2, 4, 6, 8], refill=limit)
    assert len(trained) == 4  # without signal, but the step is as large as it was asked for
    assert len(left_out) == limit
    assert len(attempts.tried) == 2 * (4 + limit)


def test_further_scenarios_are_an_order_of_their_own():
    task = Task(Path("task.py"), list(range(30)), Attempts().rollout, None)
    first, second = further_scenarios(task, 10, 3, 0), further_scenarios(task, 10, 3, 1)
    assert first == further_scenarios(task, 10, 3, 0)
    assert not set(first) & set(second)  # no scenario twice before the list is through
    assert first != task.draw(10, 3, 0)
