"""A run on a file system of two megabytes that is full at a chosen point: run as a program, in a mount namespace of its own.

Arguments: a folder to mount on, and the bytes that are free when the step begins. Prints what happened as JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
from pathlib import Path

from lockstep.errors import LockstepError
from lockstep.loop.trajectory_file import TrajectoryFile
from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup
from lockstep.runs.store import RunStore

IDENTITY = {"backend": "megatron", "base_model": "tiny", "lora": None}


def mounted(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=2m,mode=0700"):
        raise OSError(ctypes.get_errno(), "mount")


def filled(folder: Path, free: int) -> Path:
    """A file that leaves so many bytes."""
    ballast, state = folder / "ballast", os.statvfs(folder)
    with ballast.open("wb") as file:
        file.write(b"\0" * (state.f_bavail * state.f_frsize - free))
    return ballast


def groups() -> list[TrajectoryGroup]:
    turns = [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "y" * 2000}]
    return [TrajectoryGroup(trajectories=[Trajectory(messages_and_choices=turns, reward=1.0)])]


def one_step(store: RunStore, number: int) -> str:
    """The stage that the disk ended, or "done"."""
    stage = "trajectories"

    async def rolled_out() -> None:
        async with TrajectoryFile(store.path / "trajectories" / "train" / f"{number:04d}.parquet", number) as out:
            await out.finish(groups())

    try:
        asyncio.run(rolled_out())
        stage = "job"
        job = store.jobs.submit(number, "lora_step", "digest")
        store.jobs.claim(job.id)
        stage = "stage"
        staged = store.stage(number)
        try:
            (staged / "adapter").mkdir()
            (staged / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(60_000))
        except OSError:  # the trainer's own write, which has its own tests
            return "weights"
        stage = "publish"
        store.publish(number, staged, {"loss": float(number)}, job=job.id)
        stage = "record"
        store.record(number, {"late": 1.0})
    except LockstepError as error:
        return f"{stage}: {error}"
    return "done"


def main(folder: Path, free: int) -> dict[str, object]:
    mounted(folder)
    store = RunStore(folder / "runs", "project", "name")
    store.claim(IDENTITY)
    assert [one_step(store, number) for number in range(2)] == ["done", "done"]
    ballast = filled(folder, free)
    seen = one_step(store, 2)
    published = store.published()
    try:
        metrics = sorted(store.metrics())
    except LockstepError as error:
        metrics = [str(error)]
    ballast.unlink()
    store.close()
    again = RunStore(folder / "runs", "project", "name")
    again.claim(IDENTITY)
    latest = again.latest()
    assert latest is not None
    for number in range(latest.number):
        again.step(number)  # every file as it was
    following = one_step(again, latest.number + 1)
    recorded = {step: sorted(values) for step, values in again.metrics().items()}
    again.close()
    return {"seen": seen, "published": published, "metrics": metrics, "after": following, "recorded": recorded}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    sys.stdout.write(json.dumps(main(place, int(sys.argv[2]))))
