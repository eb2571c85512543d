"""Trajectories are on disk as rollouts finish, and an attempt that is made again overwrites none (audit M3)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import python_path
from lockstep.errors import RolloutError
from lockstep.loop import trajectory_file
from lockstep.loop.evaluation import kept
from lockstep.loop.run_file import TaskSection
from lockstep.loop.synchronous import roll_out
from lockstep.loop.task import Task
from lockstep.loop.trajectory_file import TrajectoryFile
from lockstep.rollouts.parquet import read_parquet
from lockstep.rollouts.trajectory import TrajectoryGroup
from random_batches import trajectory

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from random_batches import trajectory
from lockstep.loop import trajectory_file
from lockstep.loop.trajectory_file import TrajectoryFile

trajectory_file._EVERY_S = 0.05

async def main():
    async with TrajectoryFile(Path(sys.argv[1]), 3) as out:
        for reward in range(3):
            out.add(reward % 2, trajectory(reward=float(reward)))
            while not list(Path(sys.argv[1]).parent.glob(f".0003.parts/{reward + 1:06d}.parquet")):
                await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def rewards(file: Path) -> list[list[float]]:
    return [[trajectory.reward for trajectory in group.trajectories] for group in read_parquet(file)]


def groups(*values: float) -> list[TrajectoryGroup]:
    return [TrajectoryGroup(trajectories=[trajectory(reward=value)]) for value in values]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_m3_what_had_finished_survives_a_kill_beside_the_attempt_made_again(tmp_path):
    file = tmp_path / "0003.parquet"
    command = [sys.executable, "-c", KILLED, str(file)]
    environment = os.environ | {"PYTHONPATH": python_path()}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".0003.parts"]
    async with TrajectoryFile(file, 3) as out:
        await out.finish(groups(5.0, 6.0))
    assert names(tmp_path) == ["0003.attempt-1.parquet", "0003.parquet"]
    assert rewards(tmp_path / "0003.attempt-1.parquet") == [[0.0, 2.0], [1.0]]
    assert rewards(file) == [[5.0], [6.0]]
    async with TrajectoryFile(file, 3) as out:
        await out.finish(groups(7.0))
    assert rewards(tmp_path / "0003.attempt-2.parquet") == [[5.0], [6.0]]
    assert rewards(file) == [[7.0]]


async def test_m3_what_had_finished_survives_ctrl_c(tmp_path):
    """A rollout that goes on is cancelled; the one that has finished is on disk when the gather ends."""
    finished = asyncio.Event()

    async def rollout(model, scenario, temperature):
        if scenario == "slow":
            await asyncio.sleep(60)
        finished.set()
        return trajectory(reward=2.5)

    section = TaskSection(file="task.py", steps=1, groups_per_step=2, group_size=2)
    task = Task(Path("task.py"), ["slow", "quick"], rollout, None)
    file = tmp_path / "0001.parquet"
    gathering = asyncio.create_task(
        kept(lambda on_finished: roll_out(None, task, section, 0, on_finished), None, None, file, 1, "rollouts")
    )
    await finished.wait()
    await asyncio.sleep(0)
    gathering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gathering
    assert names(tmp_path) == ["0001.attempt-1.parquet"]
    assert [group for group in rewards(tmp_path / "0001.attempt-1.parquet") if group] == [[2.5, 2.5]]


async def test_m3_a_failed_gather_keeps_its_file_and_a_full_disk_ends_no_rollout(tmp_path, monkeypatch, caplog):
    class Backend:
        async def recover(self, model):
            return False

    async def gather(finished):
        finished(0, trajectory(reward=1.0))
        await asyncio.sleep(0.2)
        raise RolloutError("one failed", groups(1.0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trajectory_file, "_EVERY_S", 0.02)
    monkeypatch.setattr(TrajectoryFile, "_write_all", lambda self, groups: written.append(groups))
    monkeypatch.setattr(trajectory_file, "write_parquet", full)
    written = []
    with pytest.raises(RolloutError, match="one failed; tracebacks: "):
        await kept(gather, None, Backend(), tmp_path / "0001.parquet", 1, "rollouts")
    assert written == [groups(1.0)]
    assert "No space left on device" in caplog.text
