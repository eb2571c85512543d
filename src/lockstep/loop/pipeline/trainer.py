"""The asynchronous loop: rollouts go on while the trainer works.

Rollout workers fill a bounded queue. The trainer takes a step's groups from there, in windowed
order. A new step reaches the server while rollouts go on. With `max_steps_off_policy = 0` the loop
trains on what the synchronous one does, bit for bit.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.config.pipeline import PipelineConfig
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError, RolloutError
from lockstep.loop.evaluation import evaluated, failures_of, mean_reward
from lockstep.loop.pipeline.group_queue import GroupQueue, Taken
from lockstep.loop.pipeline.queue_file import attach_queue, restore_queue
from lockstep.loop.pipeline.rollout_workers import RolloutWorkers
from lockstep.loop.pipeline.waits import Waits
from lockstep.loop.run_file import TaskSection
from lockstep.loop.synchronous import Outcome, StepSummary, summary, targets
from lockstep.loop.task import Task
from lockstep.loop.trajectory_file import TrajectoryFile

if TYPE_CHECKING:
    from lockstep.backends.base import Backend
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import Trajectory


class PipelineTrainer:
    """Trains a registered model on rollouts that run beside the training.

    rollout: `async def rollout(model, scenario, temperature) -> Trajectory`.
    scenarios: what rollouts are asked, anything that `rollout` understands.
    evaluation_scenarios: held out. Empty: the training scenarios are evaluated.
    config: settings of a step; its `max_steps_off_policy` bounds the age of every trained token.
    pipeline: how far rollouts run ahead.
    task: the settings of [task] in a run's file: `steps`, `groups_per_step`, `group_size`, ...

    Raises ConfigError for settings that can't work together, and for a colocated backend.
    """

    def __init__(
        self,
        model: TrainableModel,
        backend: Backend,
        *,
        rollout: Callable[[TrainableModel, Any, float], Awaitable[Trajectory]],
        scenarios: Sequence[Any],
        evaluation_scenarios: Sequence[Any] = (),
        config: TrainConfig | None = None,
        pipeline: PipelineConfig | None = None,
        on_step: Callable[[StepSummary], None] = lambda row: None,
        rise: float | None = None,
        **task: Any,
    ):
        self.model, self.backend = model, backend
        self.config, self.pipeline = config or TrainConfig(), pipeline or PipelineConfig()
        self.section = TaskSection(**{"file": "", **task})
        if self.section.refill_groups:
            raise ConfigError("refill_groups has no effect in PipelineTrainer: leave it out")
        self.task = Task(Path(), list(scenarios), rollout, None, list(evaluation_scenarios))
        self.on_step, self.rise = on_step, rise
        self._waits = Waits()
        size, bound = self.section.groups_per_step, self.config.max_steps_off_policy
        self._queue = GroupQueue(size, bound, *self.pipeline.limits(bound, size))
        self._evaluations: dict[int, asyncio.Task[tuple[float, tuple[str, ...]]]] = {}
        refuse_colocated(backend.endpoint(model).colocated)

    @property
    def advice(self) -> str:
        """Who waited for whom in this run, and what to do about it, in a sentence."""
        return self._waits.advice(self.config.max_steps_off_policy)

    async def run(self) -> Outcome:
        """Train until the greedy reward reaches `stop_at_reward` or the run has `steps` steps.

        Steps are evaluated beside the training. Files are those of the synchronous loop.

        Raises ServerError once the server was lost, and RolloutError once too many rollouts failed
        in a step. What was trained until then is published, and a new call goes on from there.
        """
        model, run_path = self.model, self.backend.run_path(self.model)
        restore_queue(run_path, model.step, self._queue)
        outcome = Outcome(step=model.step)
        rows = [StepSummary(step=model.step, reward=math.nan, greedy=math.nan)]
        started = time.monotonic()
        try:
            self._evaluate(model.step, run_path)
            workers = RolloutWorkers(model, self.backend, self.task, self.section, self._queue, self.pipeline)
            async with workers:
                while model.step < self.section.steps:
                    if await self._reached(rows, outcome, wait=False):
                        return outcome
                    rows.append(await self._step(workers, run_path))
                    self._waits.seconds = time.monotonic() - started
            await self._reached(rows, outcome, wait=True)
            return outcome
        finally:
            await _cancelled(self._evaluations.values())

    async def _step(self, workers: RolloutWorkers, run_path: Path) -> StepSummary:
        """Take a step's groups, train on them, and record what the pipeline did meanwhile."""
        step, asked = self.model.step + 1, time.monotonic()
        before = self._queue.counts.copy()
        file = run_path / "trajectories" / "train" / f"{step:04d}.parquet"
        taken, failure = Taken([], []), None
        async with TrajectoryFile(file, step) as out:
            try:
                taken = await workers.take()
            except RolloutError as error:
                failure = error
            groups = failure.groups if failure else [ready.group for ready in taken.ready]
            waited_s = time.monotonic() - asked
            await out.finish(groups)
        if failure is not None:
            raise RolloutError(
                f"rollouts for step {step}: {failure}; tracebacks: {file}; to tolerate more, raise [task] max_exceptions",
                groups,
            ) from None
        figures = self._figures(workers, taken)
        draws = [ready.draw for ready in taken.ready]
        if not self.backend.endpoint(self.model).keeps_steps:
            await asyncio.gather(*self._evaluations.values())  # merged weights would change under them
        attach = functools.partial(attach_queue, step=step, queue=self._queue, trained=draws)
        result = await self.backend.train(self.model, groups, self.config, attach)
        workers.stepped()
        self._evaluate(step, run_path)
        by_trainer_s, by_groups_s = workers.held_back_s()
        self._waits.add(waited_s, by_trainer_s, by_groups_s)
        figures |= {
            "wait_for_rollouts": waited_s,
            "wait_for_trainer": by_trainer_s,
            "wait_for_slow_groups": by_groups_s,
        }
        figures |= workers.concurrency.seen()
        figures |= {f"groups_{why}": float(self._queue.counts[why] - before[why]) for why in ("stale", "failed")}
        await asyncio.to_thread(self.backend.record, self.model, figures, step)
        failures = failures_of(groups, f"rollouts for step {step}", file)
        return summary(result, mean_reward(groups), waited_s, failures)

    def _figures(self, workers: RolloutWorkers, taken: Taken) -> dict[str, float]:
        """What is seen when a step's groups are taken."""
        return {
            "groups_ready": float(len(self._queue.ready)),
            "rollouts_under_way": float(workers.under_way),
            "groups_overtaken": sum(taken.overtaken) / len(taken.overtaken),
            "duration_bias": self._queue.duration_bias,
        }

    def _evaluate(self, step: int, run_path: Path) -> None:
        """Begin the evaluation of the model's step, if it is due."""
        if step % self.section.evaluate_every and step < self.section.steps:
            return

        async def at_step() -> tuple[float, tuple[str, ...]]:
            with self.model.at_step(step):
                return await evaluated(self.model, self.backend, self.task, self.section, run_path, step, attempts=1)

        self._evaluations[step] = asyncio.create_task(at_step())

    async def _reached(self, rows: list[StepSummary], outcome: Outcome, wait: bool) -> bool:
        """Report the rows whose evaluation has ended, in order; True once one reaches the target.

        wait: for those that have not.
        """
        while len(outcome.rows) < len(rows):
            row = rows[len(outcome.rows)]
            evaluation = self._evaluations.get(row.step)
            if evaluation is not None:
                if not (wait or evaluation.done()):
                    return False
                greedy, failures = await evaluation
                row = replace(row, greedy=greedy, failures=row.failures + failures)
            outcome.step = row.step
            if math.isnan(outcome.first):
                outcome.first = row.greedy
            outcome.rows.append(row)
            self.on_step(row)
            outcome.reached = any(row.greedy >= target for target in targets(self.section, outcome.first, self.rise))
            if outcome.reached:
                return True
        return False


def refuse_colocated(colocated: bool) -> None:
    """Raise ConfigError where trainer and server take turns: nothing could overlap."""
    if colocated:
        raise ConfigError(
            "mode = pipeline needs GPUs of their own for trainer and server: colocated, rollouts stop while the trainer works; "
            "set [backend] placement, or mode = synchronous"
        )


async def _cancelled(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
