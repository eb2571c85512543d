"""Rolls out group after group while the trainer works, as far ahead as the queue allows."""

from __future__ import annotations

import asyncio
import functools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lockstep.batching.tokenize import check_sampling
from lockstep.errors import RolloutError, ServerError
from lockstep.loop.pipeline.concurrency import EVERY_S, Concurrency
from lockstep.loop.pipeline.group_queue import Draw, GroupQueue, Ready, Taken
from lockstep.loop.places import Places
from lockstep.metrics.spans import span
from lockstep.rollouts.failures import one_line
from lockstep.rollouts.gather import gather_trajectory_groups, tolerated
from lockstep.rollouts.leases import RolloutScope, current_scope
from lockstep.rollouts.noise import Noise
from lockstep.rollouts.trajectory import Trajectory
from lockstep.rollouts.versions import oldest_step

if TYPE_CHECKING:
    from lockstep.backends.base import Backend
    from lockstep.config.pipeline import PipelineConfig
    from lockstep.loop.run_file import TaskSection
    from lockstep.loop.task import Task
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import TrajectoryGroup

_PLACES = 64
"""Rollouts at once where the server does not say how many it takes."""


@dataclass
class _Group:
    """A group under way, the scopes of its rollouts that have begun, and the number that has not
    ended.
    """

    draw: Draw
    began: float
    left: int
    scopes: list[RolloutScope] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class RolloutWorkers:
    """Starts groups whenever a place is free and the queue takes more, until the last step is fed.

    Use as `async with`: at the end what is under way is cancelled.
    """

    def __init__(
        self,
        model: TrainableModel,
        backend: Backend,
        task: Task,
        section: TaskSection,
        queue: GroupQueue,
        limits: PipelineConfig,
    ):
        endpoint = backend.endpoint(model)
        self.queue = queue
        every = (endpoint.slots or 0) * max(1, len(endpoint.replicas))
        most = limits.max_concurrent or every or _PLACES
        least = limits.least_concurrent or section.group_size
        self.concurrency = Concurrency(least, most, section.group_size)
        self.places = Places(self.concurrency.now)
        self._steering: asyncio.Task[None] | None = None
        self._model, self._backend, self._task, self._section = model, backend, task, section
        self._groups: dict[int, _Group] = {}
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._failures = 0
        """Of rollouts, since the last step was taken."""
        self._waiting = self._ended = False
        self._fed = model.step
        self._held_back: tuple[str, float] | None = None
        self._held_back_s: dict[str, float] = {"trainer": 0.0, "groups": 0.0}
        self._server = endpoint.base_url

    async def __aenter__(self) -> RolloutWorkers:
        self._start_more()
        self._steering = asyncio.create_task(self._steer())
        self._steering.add_done_callback(self._note_error)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        tasks = [group.task for group in self._groups.values() if group.task]
        tasks += [self._steering] if self._steering else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _steer(self) -> None:
        """Follow the server's load; where the server does not say, up to the limit. A server that does not
        answer is found lost by its rollouts.
        """
        while True:
            try:
                load = await self._backend.load(self._model)
            except ServerError:
                await asyncio.sleep(EVERY_S)
                continue
            busy = self.under_way >= self.places.count
            kv_use, preemptions = (load.kv_use, load.preemptions) if load else (0.0, 0.0)
            self.places.resize(self.concurrency.update(kv_use, preemptions, busy))
            self._start_more()
            await asyncio.sleep(EVERY_S)

    @property
    def under_way(self) -> int:
        """Rollouts that have not ended, those that wait for a place included."""
        return sum(group.left for group in self._groups.values())

    async def take(self) -> Taken:
        """The groups of the next step, once they are ready.

        Raises ServerError if the server was lost, and RolloutError once more rollouts failed in one
        step than `max_exceptions` tolerates.
        """
        self._waiting = True
        try:
            while (taken := self._taken()) is None:
                self._start_more()
                await self._changed.wait()
        finally:
            self._waiting = False
        self._failures = 0
        self._fed += 1
        self._start_more()
        return taken

    def _taken(self) -> Taken | None:
        self._changed.clear()
        if self._failure is not None:
            raise self._failure
        return self.queue.take(self._model.step)

    def stepped(self) -> None:
        """The model has a new step: groups under way that it can't be trained on are given up."""
        oldest = self._model.step - self.queue.bound
        for group in list(self._groups.values()):
            steps = [step for scope in group.scopes if (step := self._model.pinned_step(scope)) is not None]
            if group.task and min(steps, default=oldest) < oldest:
                self.queue.give_up(group.draw, "stale", group.seconds)
                group.task.cancel()

    def held_back_s(self) -> tuple[float, float]:
        """Seconds since the last call in which places were free and the queue was full: (of groups
        that wait for the trainer, of groups under way).
        """
        self._note_held_back(self._held_back is not None)
        seconds, self._held_back_s = self._held_back_s, dict.fromkeys(self._held_back_s, 0.0)
        return seconds["trainer"], seconds["groups"]

    def _note_held_back(self, held_back: bool) -> None:
        now = time.monotonic()
        if self._held_back is not None:
            by, since = self._held_back
            self._held_back_s[by] += now - since
        by = "groups" if self._waiting or len(self.queue.under_way) > len(self.queue.ready) else "trainer"
        self._held_back = (by, now) if held_back else None

    def _start_more(self) -> None:
        section, queue = self._section, self.queue
        startable = False
        while not self._ended and self._failure is None and self.under_way < self.places.count:
            startable = queue.outstanding < (section.steps - self._fed) * queue.size
            if not startable or queue.full(self._waiting):
                break
            group = _Group(queue.draw(), time.monotonic(), section.group_size)
            self._groups[group.draw.number] = group
            group.task = asyncio.create_task(self._run(group))
            group.task.add_done_callback(functools.partial(self._group_ended, group))
            startable = False
        self._note_held_back(startable)

    async def _run(self, group: _Group) -> None:
        await self._keep(group, await self._rolled_out(group))

    def _group_ended(self, group: _Group, task: asyncio.Task[None]) -> None:
        """An error of the group's is raised when the next step's groups are taken."""
        del self._groups[group.draw.number]
        self._note_error(task)
        self._changed.set()
        self._start_more()

    def _note_error(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
            self._changed.set()

    async def _rolled_out(self, group: _Group) -> TrajectoryGroup:
        draw, section = group.draw, self._section
        scenario = self._task.scenario(draw.position, section.seed)

        async def attempt() -> Trajectory:
            try:
                async with self.places:
                    scope = current_scope()
                    assert scope is not None, "gather opens one"
                    group.scopes.append(scope)
                    trajectory = await self._task.attempt(
                        self._model, scenario, section.temperature, section.rollout_timeout_s
                    )
                if isinstance(trajectory, Trajectory):  # gather refuses anything else, and names it
                    check_sampling(trajectory)  # before all others of the step are paid for
                return trajectory
            except Exception:
                await self._check_server()  # at once: the rest of the group may last
                raise
            finally:
                group.left -= 1
                self._start_more()

        step, index = divmod(draw.position, self.queue.size)
        noise = Noise("training" if not draw.attempt else f"training again {draw.attempt}", step, index)
        with span(self._backend.run_path(self._model), "rollout", step + 1):
            [gathered] = await gather_trajectory_groups(
                [[attempt() for _ in range(section.group_size)]],
                max_exceptions=section.group_size,
                progress=False,
                noise=noise,
            )
        return gathered

    async def _keep(self, group: _Group, gathered: TrajectoryGroup) -> None:
        """Raises RolloutError where failed rollouts end the run."""
        if gathered.exceptions:
            self._check_failures(gathered)
            if len(gathered.trajectories) < 2:
                self.queue.give_up(group.draw, "failed", group.seconds)
                return
        self.queue.finish(Ready(group.draw, gathered, oldest_step(gathered), group.seconds))

    async def _check_server(self) -> None:
        """A lost server ends the run."""
        problem = await self._backend.problem(self._model)
        endpoint = self._backend.endpoint(self._model)
        if not problem and not endpoint.replicas and endpoint.base_url != self._server:
            problem = "the server was lost in a sync, and with it the rollouts under way"
        if problem:
            self._failure = self._failure or ServerError(
                f"{problem}; what was trained is published, the same command goes on from there"
            )
            self._changed.set()

    def _check_failures(self, gathered: TrajectoryGroup) -> None:
        section = self._section
        self._failures += len(gathered.exceptions)
        rollouts = self.queue.size * section.group_size
        if self._failures > (allowed := tolerated(section.max_exceptions, rollouts)):
            raise RolloutError(
                f"{self._failures} rollouts failed since the last step, {allowed} tolerated for the {rollouts} of a step "
                f"(max_exceptions); last: {one_line(gathered.exceptions[-1])}",
                [gathered],
            )
