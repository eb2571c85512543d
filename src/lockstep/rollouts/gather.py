"""Run rollouts concurrently and collect them into groups."""

from __future__ import annotations

import asyncio
import inspect
import math
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lockstep.config import deadlines
from lockstep.errors import ConfigError, DataError, RolloutError
from lockstep.rollouts.failures import failure_of, one_line
from lockstep.rollouts.leases import rollout_scope
from lockstep.rollouts.noise import Gathered, Noise
from lockstep.rollouts.trajectory import RolloutFailure, Trajectory, TrajectoryGroup

GroupSource = TrajectoryGroup | Iterable[Trajectory | Awaitable[Trajectory]] | Awaitable[TrajectoryGroup]
AfterEach = Callable[[TrajectoryGroup], Any]
_Report = Callable[[Sequence[Trajectory] | None], None]
"""Called with each slot that ended: its trajectories, or None for a failure."""


async def gather_trajectory_groups(
    groups: Iterable[GroupSource],
    *,
    max_exceptions: int | float = 0,
    progress: bool = True,
    description: str = "rollouts",
    after_each: AfterEach | None = None,
    noise: str | Noise | None = None,
) -> list[TrajectoryGroup]:
    """Run all rollouts at once and return their groups, in the order given.

    groups: each group is an iterable of rollouts, or an awaitable of a TrajectoryGroup. A rollout is a
        coroutine that returns a Trajectory, or a Trajectory. A task that you started yourself works
        too, but the model's version may then change within its rollout.
    max_exceptions: how many rollouts may fail, in all groups together. A number below 1 is a share
        of the rollouts, rounded up, but never all. A group keeps the errors of its failed rollouts.
    after_each: called with each finished group; may be async. It returns the group to keep, or a
        list of groups: an empty list drops the group.
    noise: a name for the sampling noise. A second call with the same name samples the same noise at
        the same step, as for a call that is repeated after a failure. None: noise of this call's
        own. A `Noise` also names the step and the first group.

    Raises RolloutError, naming the first failure, once too many failed; the rest is cancelled and
    what finished is in its `groups`.
    """
    gathering = _Gathering(list(groups), after_each, Gathered(noise))
    with _progress_bar(progress, description, gathering.expected) as report:
        return await gathering.run(max_exceptions, report)


def tolerated(max_exceptions: int | float, rollouts: int) -> int:
    """How many of so many rollouts may fail. Raises ConfigError for what is neither a count nor a fraction."""
    if not math.isfinite(max_exceptions) or max_exceptions < 0:
        raise ConfigError(f"max_exceptions = {max_exceptions} must be a count, or a fraction below 1")
    if max_exceptions < 1:
        return max(0, min(math.ceil(max_exceptions * rollouts), rollouts - 1))
    if max_exceptions != int(max_exceptions):
        raise ConfigError(f"max_exceptions = {max_exceptions} must be a whole number, or a fraction below 1")
    return int(max_exceptions)


async def _scoped(attempt: Awaitable[Any], gathered: Gathered, group: int, index: int) -> Any:
    with rollout_scope(), gathered.rollout(group, index):
        return await attempt


class _Gathering:
    """One call of gather: a task per rollout, what each gave, and what failed."""

    def __init__(self, sources: list[GroupSource], after_each: AfterEach | None, gathered: Gathered):
        # Per group: the finished group or the awaitable of one (a single slot), or the list of
        # attempts.
        self._slots: list[list[Any]] = []
        self._is_group: list[bool] = []
        for source in sources:
            is_group = isinstance(source, TrajectoryGroup) or inspect.isawaitable(source)
            self._is_group.append(is_group)
            self._slots.append([source] if is_group else list(source))  # type: ignore[arg-type]
        self._results: list[dict[int, Any]] = [{} for _ in sources]
        self._failures: list[dict[int, RolloutFailure]] = [{} for _ in sources]
        self._finished: dict[int, list[TrajectoryGroup]] = {}
        self._after_each = after_each
        self._gathered = gathered
        self._allowed = 0
        self._report: _Report = lambda _: None
        self.expected = sum(map(len, self._slots))

    async def run(self, max_exceptions: int | float, report: _Report) -> list[TrajectoryGroup]:
        tasks: dict[asyncio.Future[Any], tuple[int, int]] = {}
        self._report = report
        try:
            self._allowed = tolerated(max_exceptions, self.expected)
            for group, slots in enumerate(self._slots):
                for index, slot in enumerate(slots):
                    if inspect.isawaitable(slot):
                        rollout = _scoped(slot, self._gathered, group, index)
                        tasks[asyncio.ensure_future(rollout)] = (group, index)
                    else:
                        self._keep(group, index, slot)
                # This group's requests leave before the next group's are made, and the server begins with them.
                await asyncio.sleep(0)
            self._check_failures()
            for group in range(len(self._slots)):
                await self._finish(group)
            await self._wait(tasks)
        finally:
            await self._cancel(tasks)
        return [group for number in sorted(self._finished) for group in self._finished[number]]

    async def _wait(self, tasks: dict[asyncio.Future[Any], tuple[int, int]]) -> None:
        ended: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        for task in tasks:
            task.add_done_callback(ended.put_nowait)
        left = len(tasks)
        while left:
            done = [await ended.get()]
            while not ended.empty():
                done.append(ended.get_nowait())
            left -= len(done)
            for task in sorted(done, key=lambda task: tasks[task]):
                self._take(task, *tasks[task])
            self._check_failures()
            for group in sorted({tasks[task][0] for task in done}):
                await self._finish(group)

    def _take(self, task: asyncio.Future[Any], group: int, index: int) -> None:
        """Keep what an ended rollout gave, or its failure. Raises what must not be taken for a
        failure, such as KeyboardInterrupt.
        """
        error = asyncio.CancelledError("the rollout was cancelled") if task.cancelled() else task.exception()
        if error is None:
            self._keep(group, index, task.result())
        elif isinstance(error, Exception | asyncio.CancelledError):
            self._fail(group, index, error)
        else:
            raise error

    def _keep(self, group: int, index: int, result: object) -> None:
        expected = TrajectoryGroup if self._is_group[group] else Trajectory
        if not isinstance(result, TrajectoryGroup | Trajectory) or not isinstance(result, expected):
            self._fail(
                group, index, TypeError(f"the rollout gave a {type(result).__name__}, not a {expected.__name__}")
            )
            return
        trajectories = result.trajectories if isinstance(result, TrajectoryGroup) else [result]
        try:
            for trajectory in trajectories:
                _ = trajectory.choices  # whatever was appended to it is looked at here, while the rollout has a name
        except DataError as error:
            self._fail(group, index, error)
            return
        self._results[group][index] = result
        self._report(trajectories)

    def _fail(self, group: int, index: int, error: BaseException) -> None:
        self._failures[group][index] = failure_of(error)
        self._report(None)

    def _check_failures(self) -> None:
        failed = sum(map(len, self._failures))
        if failed <= self._allowed:
            return
        group = next(number for number, failures in enumerate(self._failures) if failures)
        index, first = min(self._failures[group].items())
        rollout = "" if self._is_group[group] else f", rollout {index}"
        raise RolloutError(
            f"{failed} of {self.expected} rollouts failed, {self._allowed} tolerated (max_exceptions); "
            f"first: group {group}{rollout}: {one_line(first)}",
            self._partial(),
        )

    def _group(self, number: int) -> TrajectoryGroup:
        """Group `number` from what its rollouts gave so far."""
        results, failures = self._results[number], self._failures[number]
        ordered_failures = [failures[i] for i in sorted(failures)]
        if not self._is_group[number]:
            return TrajectoryGroup(trajectories=[results[i] for i in sorted(results)], exceptions=ordered_failures)
        return results[0] if results else TrajectoryGroup(trajectories=[], exceptions=ordered_failures)

    def _partial(self) -> list[TrajectoryGroup]:
        kept = []
        for number in range(len(self._slots)):
            if number in self._finished:
                kept += self._finished[number]
            elif self._results[number] or self._failures[number]:
                kept.append(self._group(number))
        return kept

    async def _finish(self, number: int) -> None:
        """Close group `number` if its last rollout is in."""
        done = len(self._results[number]) + len(self._failures[number])
        if number in self._finished or done < len(self._slots[number]):
            return
        group = self._group(number)
        kept: Any = group
        if self._after_each is not None:
            kept = self._after_each(group)
            if inspect.isawaitable(kept):
                kept = await kept
        kept = [kept] if isinstance(kept, TrajectoryGroup) else kept
        if not isinstance(kept, list) or not all(isinstance(group, TrajectoryGroup) for group in kept):
            raise ConfigError(
                "after_each must return a TrajectoryGroup, or a list of them (an empty list drops the group)"
            )
        self._finished[number] = kept

    async def _cancel(self, tasks: dict[asyncio.Future[Any], tuple[int, int]]) -> None:
        """End what still runs, wait until it has ended, and close coroutines that never started."""
        for task in tasks:
            task.cancel()
        if tasks:
            ended, going_on = await asyncio.wait(tasks, timeout=deadlines.CANCEL_S)
            for task in ended:
                _ = task.cancelled() or task.exception()  # looked at, or asyncio would complain that nobody did
            if going_on:
                warnings.warn(
                    f"{len(going_on)} rollouts go on {deadlines.CANCEL_S:g} s after they were cancelled: they must let CancelledError pass",
                    RuntimeWarning,
                    stacklevel=2,
                )
        for slots in self._slots:
            for slot in slots:
                if inspect.iscoroutine(slot) and inspect.getcoroutinestate(slot) == inspect.CORO_CREATED:
                    slot.close()


@contextmanager
def _progress_bar(show: bool, description: str, expected: int) -> Iterator[_Report]:
    """A bar on stderr with the mean reward and the failures so far; nothing when stderr is no
    terminal.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]}  failed {task.fields[failed]}"),
        TimeElapsedColumn(),
    )
    rewards: list[float] = []
    failed = 0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=expected, reward="-", failed=0)

        def report(trajectories: Sequence[Trajectory] | None) -> None:
            nonlocal failed
            failed += trajectories is None
            rewards.extend(trajectory.reward for trajectory in trajectories or ())
            mean = f"{sum(rewards) / len(rewards):.3f}" if rewards else "-"
            bar.update(task, advance=1, reward=mean, failed=failed)

        yield report
