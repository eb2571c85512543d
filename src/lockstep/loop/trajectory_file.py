"""The file of one gather's trajectories: what finished is on disk soon, and an attempt that was
made before stays beside.

trajectories/train/0003.parquet             of the attempt that step 3 was trained on
trajectories/train/0003.attempt-1.parquet   of an attempt that a kill, Ctrl-C or a lost server ended, or that was not published
trajectories/train/.0003.parts/             of an attempt under way
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from lockstep.errors import DataError, StoreError
from lockstep.rollouts.parquet import read_parquet, write_parquet
from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup

_LOG = logging.getLogger(__name__)
_EVERY_S = 1.0
"""Between two parts: what finishes within this of the gather's end is in no part."""


class TrajectoryFile:
    """Use as `async with`: at the beginning earlier attempts are set aside, and at an end without
    `finish` this one is.
    """

    def __init__(self, file: Path, step: int):
        self.file, self._step = file, step
        self._parts = file.with_name(f".{file.stem}.parts")
        self._waiting: list[tuple[int, Trajectory]] = []
        self._written = 0
        self._writer: asyncio.Task[None] | None = None
        self._files = threading.Lock()

    async def __aenter__(self) -> TrajectoryFile:
        await asyncio.to_thread(self._set_aside)
        return self

    def add(self, group: int, trajectory: Trajectory) -> None:
        """A rollout has finished. It is on disk within a second or two, whatever becomes of this
        process then.
        """
        self._waiting.append((group, trajectory))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_parts())

    async def finish(self, groups: Sequence[TrajectoryGroup]) -> None:
        """All groups, in place of the parts. Raises DataError or StoreError where they can't be
        written.
        """
        if self._writer is not None:
            self._writer.cancel()
        try:
            await asyncio.to_thread(self._write_all, groups)
        except OSError as error:
            raise StoreError(
                f"{self.file} could not be written: {error.strerror or error}; make room there and run again"
            ) from error

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.cancel()
        if kind is None:
            return
        try:  # without awaiting: a second Ctrl-C would cancel that
            self._write_part(self._take())
            self._set_aside()
        except OSError as error:
            _LOG.warning("finished rollouts could not be set aside: %s", error)

    async def _write_parts(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            await asyncio.shield(asyncio.to_thread(self._write_part, self._take()))

    def _take(self) -> list[tuple[int, Trajectory]]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def _write_all(self, groups: Sequence[TrajectoryGroup]) -> None:
        with self._files:
            write_parquet(self.file, groups, self._step)
            shutil.rmtree(self._parts, ignore_errors=True)

    def _write_part(self, waiting: list[tuple[int, Trajectory]]) -> None:
        """Write the trajectories that finished since the last part. An error is logged and ends
        no rollout; `finish` writes all groups again, and raises what is still wrong.
        """
        if not waiting:
            return
        groups = [TrajectoryGroup(trajectories=[]) for _ in range(max(group for group, _ in waiting) + 1)]
        for group, trajectory in waiting:
            groups[group].trajectories.append(trajectory)
        try:
            with self._files:
                self._written += 1
                write_parquet(self._parts / f"{self._written:06d}.parquet", groups, self._step)
        except (DataError, OSError) as error:
            _LOG.warning("%d finished rollouts are not on disk yet: %s", len(waiting), error)

    def _set_aside(self) -> None:
        """The files of an attempt move to a name of their own."""
        with self._files:
            self._move()

    def _move(self) -> None:
        if self.file.exists():
            self.file.rename(self._next_attempt())
        if not self._parts.is_dir():
            return
        groups: list[TrajectoryGroup] = []
        for part in sorted(self._parts.glob("[0-9]*.parquet")):
            try:
                part_groups = read_parquet(part)
            except StoreError as error:
                _LOG.warning("a part of an earlier attempt is lost: %s", error)
                continue
            groups += [TrajectoryGroup(trajectories=[]) for _ in range(len(part_groups) - len(groups))]
            for group, part_group in zip(groups, part_groups, strict=False):
                group.trajectories += part_group.trajectories
        if groups:
            write_parquet(self._next_attempt(), groups, self._step)
        shutil.rmtree(self._parts)

    def _next_attempt(self) -> Path:
        names = self.file.parent.glob(f"{self.file.stem}.attempt-*.parquet")
        made = [int(name.stem.rpartition("-")[2]) for name in names if name.stem.rpartition("-")[2].isdecimal()]
        return self.file.with_name(f"{self.file.stem}.attempt-{max(made, default=0) + 1}.parquet")
