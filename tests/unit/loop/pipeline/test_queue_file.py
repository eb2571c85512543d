"""A run that is killed at any moment trains every group once: the queue is in the checkpoint."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from lockstep.errors import StoreError
from lockstep.loop.pipeline.group_queue import Draw, GroupQueue, Ready
from lockstep.loop.pipeline.queue_file import attach_queue, restore_queue
from lockstep.rollouts.trajectory import TrajectoryGroup
from lockstep.runs.checkpoint import read_manifest, write_manifest
from random_batches import trajectory

SIZE, BOUND, STEPS = 3, 2, 40


class Killed(Exception):
    """The process ended here."""


class Run:
    """A trainer and rollouts in random order. `publish` writes what a checkpoint holds; a kill may come between any two acts."""

    def __init__(self, path: Path, seed: int, kills: int):
        self.path, self.random, self.kills = path, random.Random(seed), kills
        self.rolled: dict[tuple[int, int], float] = {}

    def life(self, step: int) -> int:
        """One process from `step` on: returns the last published step once all are made, or raises Killed."""
        queue = GroupQueue(SIZE, BOUND, 3, 3)
        restore_queue(self.path, step, queue)
        while step < STEPS:
            self.maybe_killed()
            while not queue.full(waiting=True):
                queue.draw()
            if queue.under_way and self.random.random() < 0.8:
                draw = self.random.choice(list(queue.under_way.values()))
                queue.finish(Ready(draw, self.rollout(draw), max(0, step - self.random.randrange(2)), 1.5))
            elif (taken := queue.take(step)) is not None:
                self.maybe_killed()
                asyncio.run(self.publish(step + 1, queue, [ready.draw for ready in taken.ready]))
                step += 1
        return step

    def rollout(self, draw: Draw) -> TrajectoryGroup:
        return TrajectoryGroup(trajectories=[trajectory(reward=float(draw.position))], metadata={"of": draw.position})

    def maybe_killed(self) -> None:
        if self.kills and self.random.random() < 0.1:
            self.kills -= 1
            raise Killed

    async def publish(self, step: int, queue: GroupQueue, trained: list[Draw]) -> None:
        folder = self.path / "steps" / f"{step:04d}"
        folder.mkdir(parents=True)
        state = await attach_queue(folder, step, queue, trained)
        write_manifest(folder, {"step": step, "metrics": {}, "state": state})


def published(path: Path) -> int:
    return max(int(folder.name) for folder in (path / "steps").iterdir())


def test_killed_at_30_random_points_every_group_is_trained_once(tmp_path):
    run = Run(tmp_path, random.randrange(2**32), kills=30)
    asyncio.run(run.publish(0, GroupQueue(SIZE, BOUND, 3, 3), []))
    while True:
        try:
            run.life(published(tmp_path))
            break
        except Killed:
            continue
    states = [read_manifest(tmp_path / "steps" / f"{n:04d}")["state"]["pipeline"] for n in range(STEPS + 1)]
    counted = Counter(each["position"] for state in states for each in state["trained"])
    assert run.kills < 30
    assert counted.total() == SIZE * STEPS
    assert set(counted.values()) == {1}
    queue = GroupQueue(SIZE, BOUND, 3, 3)
    restore_queue(tmp_path, STEPS, queue)
    left = [draw.position for draw in queue.again] + [ready.draw.position for ready in queue.ready.values()]
    assert sorted([*counted, *left]) == list(range(queue.position))
    for ready in queue.ready.values():
        assert ready.group.metadata == {"of": ready.draw.position}


def test_a_queue_after_a_synchronous_run_begins_behind_its_scenarios(tmp_path):
    folder = tmp_path / "steps" / "0005"
    folder.mkdir(parents=True)
    write_manifest(folder, {"step": 5, "metrics": {}, "state": {}})
    queue = GroupQueue(4, 1, 2, 2)
    restore_queue(tmp_path, 5, queue)
    assert queue.draw().position == 20


def test_a_queue_of_another_version_is_refused(tmp_path):
    folder = tmp_path / "steps" / "0001"
    folder.mkdir(parents=True)
    write_manifest(folder, {"step": 1, "metrics": {}, "state": {"pipeline": {"schema": 7}}})
    with pytest.raises(StoreError, match="schema 7, this version reads 1"):
        restore_queue(tmp_path, 1, GroupQueue(4, 1, 2, 2))
