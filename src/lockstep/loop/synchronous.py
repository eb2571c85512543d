"""The loop: evaluate, roll out, train, until the reward or the last step is reached.

This is the whole of `lockstep train`; a user's own script can call the same few lines with their own objects.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.errors import RolloutError
from lockstep.rollouts.gather import gather_trajectory_groups
from lockstep.rollouts.parquet import write_parquet
from lockstep.rollouts.trajectory import TrajectoryGroup

if TYPE_CHECKING:
    from lockstep.backends.base import Backend
    from lockstep.config.train import TrainConfig
    from lockstep.loop.run_file import TaskSection
    from lockstep.loop.task import Task
    from lockstep.model import TrainableModel


_ROUNDING = 1e-9
"""A difference of two means is the rise that was asked for up to this."""


@dataclass(frozen=True)
class StepSummary:
    """One line of the live table. Rewards are means; seconds are wall time. NaN: not measured in this step.

    signal: False where no group's rewards differed, so that nothing was trained.
    """

    step: int
    reward: float
    greedy: float
    loss: float = math.nan
    kl: float = math.nan
    mismatch: float = math.nan
    rollout_s: float = math.nan
    train_s: float = math.nan
    sync_s: float = math.nan
    signal: bool = True


@dataclass
class Outcome:
    """How a run ended: its rows, the last published step, and whether the target reward was reached."""

    rows: list[StepSummary] = field(default_factory=list)
    step: int = 0
    reached: bool = False
    first: float = math.nan
    """The first greedy reward that was measured."""

    @property
    def greedy(self) -> float:
        return self.rows[-1].greedy if self.rows else math.nan


async def greedy_reward(model: TrainableModel, task: Task, limit: int, max_exceptions: int | float = 0) -> float:
    """Mean reward of one rollout per scenario at temperature 0 (the first `limit` of the task's evaluation scenarios, of its
    scenarios if it has none), without those that failed; NaN if all did, which `max_exceptions` has to tolerate.
    """
    groups = await gather_trajectory_groups(
        [[task.rollout(model, scenario, 0.0)] for scenario in (task.evaluation_scenarios or task.scenarios)[:limit]],
        max_exceptions=max_exceptions,
        progress=False,
    )
    rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
    return sum(rewards) / len(rewards) if rewards else math.nan


async def roll_out(model: TrainableModel, task: Task, section: TaskSection, step: int) -> list[TrajectoryGroup]:
    """The groups of one step: `groups_per_step` scenarios, each tried `group_size` times."""
    scenarios = task.draw(section.groups_per_step, section.seed, step)
    return await gather_trajectory_groups(
        [
            [task.rollout(model, scenario, section.temperature) for _ in range(section.group_size)]
            for scenario in scenarios
        ],
        max_exceptions=section.max_exceptions,
        progress=False,
    )


async def run(
    model: TrainableModel,
    backend: Backend,
    task: Task,
    section: TaskSection,
    config: TrainConfig,
    run_path: Path,
    on_step: Callable[[StepSummary], None],
    rise: float | None = None,
) -> Outcome:
    """Train until the greedy reward reaches `stop_at_reward` or the run has `steps` steps.

    rise: the greedy reward also suffices once it is this much above the first one measured here.

    The model must be registered. Trajectories of every step are on disk before it is trained, those of a failed gather too.
    """
    outcome = Outcome(step=model.step)
    while True:
        step = model.step
        greedy = math.nan
        last = step >= section.steps
        if last or step % section.evaluate_every == 0:
            greedy = await greedy_reward(model, task, section.evaluate_scenarios, section.max_exceptions)
        outcome.step = step
        if math.isnan(outcome.first):
            outcome.first = greedy
        outcome.reached = any(greedy >= target for target in _targets(section, outcome.first, rise))
        if outcome.reached or last:
            row = StepSummary(step=step, reward=math.nan, greedy=greedy)
            outcome.rows.append(row)
            on_step(row)
            return outcome
        row = await _one_step(model, backend, task, section, config, run_path, greedy)
        outcome.rows.append(row)
        on_step(row)


def _targets(section: TaskSection, first: float, rise: float | None) -> list[float]:
    risen = None if rise is None else first + rise - _ROUNDING
    return [target for target in (section.stop_at_reward, risen) if target is not None]


async def _one_step(
    model: TrainableModel,
    backend: Backend,
    task: Task,
    section: TaskSection,
    config: TrainConfig,
    run_path: Path,
    greedy: float,
) -> StepSummary:
    step = model.step
    trajectories = run_path / "trajectories" / "train" / f"{step:04d}.parquet"
    started = time.monotonic()
    try:
        groups = await roll_out(model, task, section, step)
    except RolloutError as error:
        await asyncio.to_thread(write_parquet, trajectories, error.groups, step)
        raise
    await asyncio.to_thread(write_parquet, trajectories, groups, step)
    rollout_s = time.monotonic() - started
    result = await backend.train(model, groups, config)
    rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
    metrics = result.metrics
    return StepSummary(
        step=step,
        reward=sum(rewards) / len(rewards),
        greedy=greedy,
        loss=metrics["loss"],
        kl=metrics.get("kl", math.nan),
        mismatch=metrics.get("mismatch", math.nan),
        rollout_s=rollout_s,
        train_s=metrics["seconds_train"],
        sync_s=metrics["seconds_sync"],
        signal=not metrics.get("no_signal"),
    )
