"""The loop: evaluate, roll out, train, until the reward or the last step is reached.

This is the whole of `lockstep train`; a user's own script can call the same few lines with their
own objects.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.batching.advantages import REWARD_EPS
from lockstep.batching.tokenize import check_sampling
from lockstep.loop.evaluation import Finished, evaluated, failures_of, gather_tries, kept, mean_reward
from lockstep.loop.refill import LEFT_OUT, further_scenarios, refilled
from lockstep.metrics.spans import span

if TYPE_CHECKING:
    from lockstep.backends.base import Backend, TrainResult
    from lockstep.config.train import TrainConfig
    from lockstep.loop.run_file import TaskSection
    from lockstep.loop.task import Task
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup


_TRAINING = "training"
"""What the noise of the rollouts begins with that a step is trained on."""
_ROUNDING = 1e-9
"""A difference of two means is the rise that was asked for up to this."""


@dataclass(frozen=True)
class StepSummary:
    """One line of the live table. Rewards are means; seconds are wall time. NaN: not measured in
    this step.

    step: the checkpoint that all of the line is about, as in the run's metrics and folders.
    reward: of the rollouts that the step was trained on.
    greedy: of the checkpoint itself.
    signal: False where no group's rewards differed, so that nothing was trained.
    compilations, compile_s: programs that the step compiled, and the time within train_s for that.
    failures: a sentence for each gather of the row that left failed rollouts out.
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
    compilations: int = 0
    compile_s: float = 0.0
    failures: tuple[str, ...] = ()


@dataclass
class Outcome:
    """The end of a run: its rows, the last published step, and whether the target reward was
    reached.
    """

    rows: list[StepSummary] = field(default_factory=list)
    step: int = 0
    reached: bool = False
    first: float = math.nan
    """The first greedy reward that was measured."""

    @property
    def greedy(self) -> float:
        return self.rows[-1].greedy if self.rows else math.nan


async def roll_out(
    model: TrainableModel,
    task: Task,
    section: TaskSection,
    step: int,
    finished: Finished = lambda group, trajectory: None,
    reward_eps: float = REWARD_EPS,
) -> list[TrajectoryGroup]:
    """The groups of one step: `groups_per_step` scenarios, each tried `group_size` times.

    With `refill_groups`, groups that a further one replaced follow, marked `refill.LEFT_OUT`.
    """
    tries, temperature = section.group_size, section.temperature

    def ended(group: int, trajectory: Trajectory) -> None:
        check_sampling(trajectory)  # before all others of the step are paid for
        finished(group, trajectory)

    async def gather(scenarios: Sequence[Any], noise: str) -> list[TrajectoryGroup]:
        return await gather_tries(model, task, section, scenarios, noise, ended, tries, temperature)

    groups = await gather(task.draw(section.groups_per_step, section.seed, step), _TRAINING)
    if not section.refill_groups:
        return groups
    further = further_scenarios(task, section.refill_groups, section.seed, step)
    return await refilled(
        groups, further, lambda some, number: gather(some, f"{_TRAINING}, refill {number}"), reward_eps
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

    The model must be registered. Below `run_path`, trajectories/train/0003.parquet holds the
    training data of step 3, written before training. trajectories/evaluation/0003.parquet holds the
    answers of step 3. Both also keep a failed gather. `trajectory_file.py` says what is there of
    earlier attempts.
    """
    outcome = Outcome(step=model.step)
    row = StepSummary(step=model.step, reward=math.nan, greedy=math.nan)
    while True:
        last = row.step >= section.steps
        if last or row.step % section.evaluate_every == 0:
            greedy, failures = await evaluated(model, backend, task, section, run_path, model.step)
            row = replace(row, greedy=greedy, failures=row.failures + failures)
        outcome.step = row.step
        if math.isnan(outcome.first):
            outcome.first = row.greedy
        outcome.reached = any(row.greedy >= target for target in targets(section, outcome.first, rise))
        outcome.rows.append(row)
        on_step(row)
        if outcome.reached or last:
            return outcome
        row = await _one_step(model, backend, task, section, config, run_path)


def targets(section: TaskSection, first: float, rise: float | None) -> list[float]:
    risen = None if rise is None else first + rise - _ROUNDING
    return [target for target in (section.stop_at_reward, risen) if target is not None]


async def _one_step(
    model: TrainableModel, backend: Backend, task: Task, section: TaskSection, config: TrainConfig, run_path: Path
) -> StepSummary:
    before, step = model.step, model.step + 1
    started, what = time.monotonic(), f"rollouts for step {step}"
    file = run_path / "trajectories" / "train" / f"{step:04d}.parquet"
    with span(run_path, "rollout", step):
        groups = await kept(
            lambda finished: roll_out(model, task, section, before, finished, config.reward_eps),
            *(model, backend, file, step, what),
        )
    rollout_s = time.monotonic() - started
    every, groups = groups, [group for group in groups if LEFT_OUT not in group.metadata]
    result = await backend.train(model, groups, config)
    if section.refill_groups:
        replaced = {"groups_left_out": float(len(every) - len(groups))}
        await asyncio.to_thread(backend.record, model, replaced)
    await asyncio.to_thread(backend.record, model, {"seconds_rollout": rollout_s})
    return summary(result, mean_reward(groups), rollout_s, failures_of(groups, what, file))


def summary(result: TrainResult, reward: float, rollout_s: float, failures: tuple[str, ...]) -> StepSummary:
    """The row of a step that was just trained, not yet evaluated."""
    metrics = result.metrics
    return StepSummary(
        step=result.step,
        reward=reward,
        greedy=math.nan,
        loss=metrics["loss"],
        kl=metrics.get("kl", math.nan),
        mismatch=metrics.get("mismatch", math.nan),
        rollout_s=rollout_s,
        train_s=metrics["seconds_train"],
        sync_s=metrics["seconds_sync"],
        signal=not metrics.get("no_signal"),
        compilations=int(metrics.get("compilations", 0)),
        compile_s=metrics.get("seconds_compile", 0.0),
        failures=failures,
    )
