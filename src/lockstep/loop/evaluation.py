"""The evaluation of a step: greedy, and sampled for pass@k, on scenarios that may be held out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.errors import RolloutError
from lockstep.loop.places import Places
from lockstep.loop.trajectory_file import TrajectoryFile
from lockstep.metrics.spans import span
from lockstep.rollouts.failures import one_line
from lockstep.rollouts.gather import gather_trajectory_groups
from lockstep.rollouts.trajectory import Trajectory

if TYPE_CHECKING:
    from lockstep.backends.base import Backend
    from lockstep.loop.run_file import TaskSection
    from lockstep.loop.task import Task
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import TrajectoryGroup

Finished = Callable[[int, Trajectory], None]
"""Called with each rollout that ended well: its group, and its trajectory."""
_RESAMPLES = 2000
"""Of the bootstrap: the ends of an interval then move by about a hundredth of its width."""


def mean_reward(groups: Sequence[TrajectoryGroup]) -> float:
    """Mean over the trajectories of all groups; NaN if there is none."""
    rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
    return sum(rewards) / len(rewards) if rewards else math.nan


async def gather_tries(
    model: TrainableModel,
    task: Task,
    section: TaskSection,
    scenarios: Sequence[Any],
    noise: str,
    finished: Finished,
    tries: int,
    temperature: float,
    places: Places | None = None,
) -> list[TrajectoryGroup]:
    """A group of `tries` rollouts per scenario, in order.

    places: rollouts at once; None: all.
    """
    places = places or Places(len(scenarios) * tries)

    async def attempt(group: int, scenario: Any) -> Trajectory:
        async with places:
            trajectory = await task.attempt(model, scenario, temperature, section.rollout_timeout_s)
        if isinstance(trajectory, Trajectory):  # gather refuses anything else, and names it
            finished(group, trajectory)
        return trajectory

    return await gather_trajectory_groups(
        [[attempt(group, scenario) for _ in range(tries)] for group, scenario in enumerate(scenarios)],
        max_exceptions=section.max_exceptions,
        progress=False,
        noise=noise,
    )


async def evaluate(
    model: TrainableModel, task: Task, section: TaskSection, finished: Finished = lambda group, trajectory: None
) -> list[TrajectoryGroup]:
    """A group of one rollout per scenario at temperature 0: the first `evaluate_scenarios` of the
    task's evaluation scenarios. A task without evaluation scenarios uses its scenarios.
    """
    scenarios, places = _evaluation(task, section)
    return await gather_tries(model, task, section, scenarios, "evaluation", finished, 1, 0.0, places)


async def sample(model: TrainableModel, task: Task, section: TaskSection, finished: Finished) -> list[TrajectoryGroup]:
    """`evaluate_samples` tries of the same scenarios, at the temperature of training."""
    scenarios, places = _evaluation(task, section)
    tries, temperature = section.evaluate_samples, section.temperature
    return await gather_tries(model, task, section, scenarios, "samples", finished, tries, temperature, places)


def _evaluation(task: Task, section: TaskSection) -> tuple[Sequence[Any], Places]:
    scenarios = (task.evaluation_scenarios or task.scenarios)[: section.evaluate_scenarios]
    return scenarios, Places(section.evaluate_concurrent)


async def evaluated(
    model: TrainableModel,
    backend: Backend,
    task: Task,
    section: TaskSection,
    run_path: Path,
    step: int,
    attempts: int = 2,
) -> tuple[float, tuple[str, ...]]:
    """The greedy reward of the model's `step`, kept with its metrics, and what failed; its rollouts
    are on disk.

    attempts: 2: where the server was lost, the rollouts begin again on a new one.
    """
    what, folder = f"evaluation of step {step}", run_path / "trajectories"
    file = folder / "evaluation" / f"{step:04d}.parquet"
    with span(run_path, "evaluation", step):
        groups = await kept(
            lambda ended: evaluate(model, task, section, ended), model, backend, file, step, what, attempts
        )
    metrics, failures = greedy_metrics(groups), failures_of(groups, what, file)
    if section.evaluate_samples:
        file = folder / "samples" / f"{step:04d}.parquet"
        sampled = await kept(
            lambda ended: sample(model, task, section, ended), model, backend, file, step, what, attempts
        )
        metrics |= sampled_metrics(sampled, section.pass_reward)
        failures += failures_of(sampled, what, file)
    await asyncio.to_thread(backend.record, model, metrics, step)
    return mean_reward(groups), failures


def failures_of(groups: Sequence[TrajectoryGroup], what: str, file: Path) -> tuple[str, ...]:
    """A sentence on the rollouts that failed and were tolerated, if there are any."""
    failed = [failure for group in groups for failure in group.exceptions]
    if not failed:
        return ()
    count = len(failed) + sum(len(group.trajectories) for group in groups)
    return (f"{what}: {len(failed)} of {count} rollouts failed; first: {one_line(failed[0])}; tracebacks: {file}",)


async def kept(
    gather: Callable[[Finished], Awaitable[list[TrajectoryGroup]]],
    model: TrainableModel,
    backend: Backend,
    file: Path,
    step: int,
    what: str,
    attempts: int = 2,
) -> list[TrajectoryGroup]:
    """The groups of a gather, once they are on disk. Where rollouts failed because the server was
    lost, they begin again on a new one, with `attempts` = 2.

    What was there of an attempt before stays, under another name.

    The error of a gather that failed says what failed and where its tracebacks are.
    """
    for attempt in range(attempts):
        failure = None
        async with TrajectoryFile(file, step) as out:
            try:
                groups = await gather(out.add)
            except RolloutError as error:
                failure, groups = error, error.groups
            await out.finish(groups)
        failed = failure is not None or any(group.exceptions for group in groups)
        if attempt + 1 < attempts and failed and await backend.recover(model):
            continue
        if failure is None:
            return groups
        raise RolloutError(
            f"{what}: {failure}; tracebacks: {file}; to tolerate more, raise [task] max_exceptions", groups
        ) from None
    raise AssertionError("the last attempt returns or raises")


def greedy_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """The greedy reward with its interval, where anything was measured, and how many rollouts
    failed.
    """
    rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
    failed = {"greedy_rollouts_failed": float(sum(len(group.exceptions) for group in groups))}
    return failed | (_with_interval("greedy_reward", rewards) if rewards else {})


def sampled_metrics(groups: Sequence[TrajectoryGroup], pass_reward: float) -> dict[str, float]:
    """The mean reward of sampled tries, and pass@k for k = 1, 2, 4, ... up to the number of tries;
    each a mean over scenarios, with its interval.

    A scenario counts for k if it has k tries that did not fail.
    """
    tried = [[trajectory.reward for trajectory in group.trajectories] for group in groups if group.trajectories]
    if not tried:
        return {}
    metrics = _with_interval("sampled_reward", [sum(rewards) / len(rewards) for rewards in tried])
    k = 1
    while enough := [rewards for rewards in tried if len(rewards) >= k]:
        passed = [(len(rewards), sum(reward >= pass_reward for reward in rewards)) for rewards in enough]
        metrics |= _with_interval(f"pass_at_{k}", [pass_at(k, tries, right) for tries, right in passed])
        k *= 2
    return metrics


def pass_at(k: int, tries: int, right: int) -> float:
    """The chance that one of `k` tries is right, from `right` of `tries`: the unbiased estimate of
    Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    return 1.0 - math.comb(tries - right, k) / math.comb(tries, k)


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean over scenarios, and its 95% interval: the bootstrap's percentiles, the same for the
    same values.
    """
    values_N = np.asarray(values)
    drawn_RN = np.random.default_rng(0).integers(0, len(values_N), (_RESAMPLES, len(values_N)))
    low, high = np.quantile(values_N[drawn_RN].mean(1), (0.025, 0.975))
    return {name: sum(values) / len(values), f"{name}_low": float(low), f"{name}_high": float(high)}
