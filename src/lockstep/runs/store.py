"""A run on disk: immutable steps published atomically, metrics in one SQLite file, logs and
trajectories beside them.

    <path>/<project>/<name>/   only its owner can read it: prompts, answers and weights are in there
        run.sqlite            what the run is (base model, LoRA), metrics of each step, jobs
        metrics.jsonl         the same metrics, a line a part of a step
        run.lock              held by the process that trains the run
        steps/0003/           adapter/, trainer/, manifest.json (SHA-256 of every file); never changed once it has this name
        removed/0002.json     the manifest of a step that retention removed
        trajectories/         of rollouts and evaluations, a Parquet file each
        tokens/               what each step's trainer computed for the tokens that it was trained on
        logs/ batches/

A step is written under a temporary name, flushed to disk, and renamed. Whatever still has a
temporary name was never published. A step is removed in the other order: it loses its name first.
One that loses only its optimizer state is marked before.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lockstep.errors import StoreError
from lockstep.metrics.feed import Feeds
from lockstep.metrics.sinks import find_sinks
from lockstep.metrics.sinks.base import SinkRun
from lockstep.process.durable import fsync
from lockstep.process.owned_lock import LockHeldError, take
from lockstep.runs.checkpoint import (
    MANIFEST,
    STATELESS,
    RunCheckpoint,
    read_checked,
    read_manifest,
    write_manifest,
)
from lockstep.runs.database import RunDatabase, read_identity
from lockstep.runs.jobs import JobTable

_LOG = logging.getLogger(__name__)
_STAGING = ".staging-"
REMOVED = ".removed-"
_NUMBER = re.compile(r"[0-9]{4,}")


class RunStore:
    """The folder of one run. One process at a time may hold it open; readers use `published_steps`."""

    def __init__(self, path: str | Path, project: str, name: str):
        self.path = Path(path).expanduser().resolve() / project / name
        self.steps_path = self.path / "steps"
        self._references: dict[int, RunCheckpoint] = {}
        self._teachers: set[Path] = set()
        self._feeds: Feeds | None = None
        self._unrecorded: list[tuple[int, Mapping[str, float], str | None]] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.chmod(0o700)  # a run of an earlier version
            for folder in (self.steps_path, self.path / "logs", self.path / "batches"):
                folder.mkdir(exist_ok=True)
            self._lock = take(self.path / "run.lock")
        except LockHeldError as owner:
            raise StoreError(
                f"{self.path} is in use by {owner}: stop that run, or choose another name or path"
            ) from None
        except OSError as error:
            raise StoreError(f"{self.path} can't be written ({error.strerror}): choose another path") from None
        try:
            self._remove_unpublished()
            self._check_steps()
            self._database = RunDatabase(self.path)
            self._identity = self._database.identity()
            self._restore_metrics()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._feeds is not None:
            self._feeds.close()
        self._lock.release()

    def _remove_unpublished(self) -> None:
        for leftover in (*self.steps_path.glob(f"{_STAGING}*"), *self.steps_path.glob(f"{REMOVED}*")):
            shutil.rmtree(leftover)
        # Of a step that a kill ended: its batch, weights on their way to the server, half-written
        # trajectories.
        for leftover in (*self.path.glob("batches/*"), *self.path.glob("trajectories/*/.*.parquet.*")):
            leftover.unlink()
        shutil.rmtree(self.path / "weights", ignore_errors=True)
        for marked in self.steps_path.glob(f"*/{STATELESS}"):
            shutil.rmtree(marked.parent / "trainer", ignore_errors=True)

    def _check_steps(self) -> None:
        """Raise StoreError for a step without a manifest: the run would go on before it, and could
        never publish its number again.
        """
        for folder in _step_folders(self.path):
            if not (folder / MANIFEST).is_file():
                raise StoreError(
                    f"{folder} has no {MANIFEST}: the step is damaged; delete {folder} to resume before it"
                )

    def _restore_metrics(self) -> None:
        """A step that was published, and whose metrics or whose job's end were not recorded any
        more, from its manifest.

        Other jobs that a process left under way have failed.
        """
        recorded = self._database.metrics()
        under_way = {job.step for job in self.jobs.listed() if job.state in ("queued", "running")}
        for number in self.published():
            if number not in recorded or number in under_way:
                manifest = read_manifest(self._folder(number))
                self._database.record(number, manifest["metrics"], manifest.get("job"))
        self.jobs.interrupt(max(self.published(), default=-1))

    @property
    def jobs(self) -> JobTable:
        """What the run's backend asked of its trainer and server."""
        return self._database.jobs

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Record what this run trains; raise StoreError if the folder already belongs to something
        else.

        An identity that run.sqlite has lost comes from the newest step's manifest.
        """
        known = self._identity
        if not known and (steps := self.published()):
            known = read_manifest(self._folder(steps[-1])).get("identity", {})
            if not known:
                raise StoreError(
                    f"{self.path} has {len(steps)} steps, but run.sqlite doesn't say of which model: restore the file, or choose "
                    "another model name or path"
                )
        for key, value in identity.items():
            if key in known and known[key] != value:
                raise StoreError(
                    f"{self.path} was started with {key} = {known[key]!r}, not {value!r}: "
                    "use the same setting, or another model name or path"
                )
        self._identity = {"key": uuid.uuid4().hex, **identity, **known}
        self._database.add_identity(self._identity)

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        """Record what the run was started with this time; a later start may differ, and replaces
        it.
        """
        self._database.keep_settings(settings)

    def send_metrics_to(self, sinks: Sequence[str], settings: Mapping[str, Any]) -> None:
        """From now on, metrics also go to `metrics.jsonl` and to these sinks. The run is claimed
        before.

        settings: of the run, for the sinks that show them.

        Raises ConfigError as `find_sinks` does. A sink that fails later gets a warning.
        """
        run = SinkRun(self.path, self.path.parent.name, self.path.name, self._identity["key"], settings)
        self._feeds = Feeds(find_sinks(sinks), run, self._database.metrics())

    def next_server_start(self) -> int:
        """Count one more start of the run's server; how many there were before, in all processes
        that worked on the run.
        """
        return self._database.next_server_start()

    def published(self) -> list[int]:
        """Numbers of the published steps, ascending."""
        return published_steps(self.path)

    def latest(self) -> RunCheckpoint | None:
        """The last published step, its files checked against the manifest; None for a new run.

        Raises StoreError if a file of it is missing or changed.
        """
        numbers = self.published()
        return self.step(numbers[-1]) if numbers else None

    def step(self, number: int) -> RunCheckpoint:
        """A published step, its files checked against the manifest."""
        return _read_step(self.path, number)

    def reference(self, number: int, with_state: bool) -> Path:
        """The folder of the step that a KL penalty pulls towards: checked once, and kept from then
        on.

        with_state: full weights are read from the optimizer's state.

        Raises StoreError if that, or the whole step, was removed.
        """
        known = self._references.get(number)
        if known is None or not (known.path / MANIFEST).is_file():
            known = self.step(number)
            if with_state and not known.resumable:
                raise StoreError(
                    f"kl_reference_step = {number}: retention removed its optimizer state, which holds the full weights; train with the "
                    "penalty from the start, or set [backend] keep_optimizer_states = true"
                )
            self._database.add_reference(number)
            self._references[number] = known
        return known.path

    def teacher(self, folder: Path, with_state: bool) -> Path:
        """The folder of another run's published step, which a KL penalty pulls towards: checked once.

        Raises StoreError for a folder that is none, for a step of another base model, and for one
        whose full weights were removed (`with_state`).
        """
        folder = folder.expanduser().resolve()
        if folder in self._teachers:
            return folder
        if not folder.name.isdecimal() or len(folder.parents) < 2:
            raise StoreError(f"kl_reference_path = {folder} is no step: give PATH/PROJECT/NAME/steps/NUMBER")
        identity, step = read_checkpoint(folder.parents[1], int(folder.name))
        theirs, ours = (known.get("base_model") for known in (identity, self._identity))
        if theirs != ours:
            raise StoreError(f"kl_reference_path = {folder} is a step of {theirs}, this run trains {ours}")
        if with_state and not step.resumable:
            raise StoreError(f"kl_reference_path = {folder} has no optimizer state, which holds the full weights")
        self._teachers.add(folder)
        return folder

    def references(self) -> set[int]:
        """Steps that a KL penalty of this run has pulled towards."""
        return self._database.references()

    def stage(self, number: int) -> Path:
        """An empty folder to write step `number` into before `publish`."""
        folder = self.steps_path / f"{_STAGING}{folder_name(number)}-{os.getpid()}"
        with _writing(f"step {number}", folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
        return folder

    def publish(
        self,
        number: int,
        staged: Path,
        metrics: Mapping[str, float],
        state: Mapping[str, Any] | None = None,
        job: str | None = None,
    ) -> RunCheckpoint:
        """Make a staged folder step `number`: digests, flush, rename, flush. All or nothing.

        job: that made the step. It is done when the metrics are recorded, or, after a kill, at the
            next start.

        Raises StoreError if the step exists or leaves a gap, or the disk takes no more. Metrics that
        can't be recorded are in the manifest, and are recorded later.
        """
        numbers = self.published()
        if number != (numbers[-1] + 1 if numbers else 0):
            raise StoreError(f"step {number} can't follow {numbers[-1] if numbers else 'nothing'} in {self.path}")
        return self._published(number, staged, metrics, state, job)

    def publish_first(
        self, number: int, staged: Path, metrics: Mapping[str, float], state: Mapping[str, Any]
    ) -> RunCheckpoint:
        """`publish` for the first step of a run that goes on from another run's. Raises StoreError
        for a run that has steps.
        """
        if numbers := self.published():
            raise StoreError(f"{self.path} has steps already, the last is {numbers[-1]}")
        return self._published(number, staged, metrics, state, None)

    def _published(
        self,
        number: int,
        staged: Path,
        metrics: Mapping[str, float],
        state: Mapping[str, Any] | None,
        job: str | None,
    ) -> RunCheckpoint:
        final, fields = self._folder(number), {"step": number, "published": time.time(), "identity": self._identity}
        fields |= {"metrics": dict(metrics), "state": dict(state or {}), "job": job}
        with _writing(f"step {number}", final):
            manifest = write_manifest(staged, fields)
            staged.rename(final)
            fsync(self.steps_path)
        self._record(number, metrics, job)
        return RunCheckpoint(number, final, manifest)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to a step (a later value of the same name replaces the earlier)."""
        self._record(step, metrics)

    def _record(self, step: int, metrics: Mapping[str, float], job: str | None = None) -> None:
        """Metrics that the disk does not take now are kept for the next call: a step that was
        trained is not lost for them.
        """
        if self._feeds is not None:
            self._feeds.write(step, metrics)
        waiting, self._unrecorded = [*self._unrecorded, (step, metrics, job)], []
        for position, (number, values, made_by) in enumerate(waiting):
            try:
                self._database.record(number, values, made_by)
            except StoreError as error:
                self._unrecorded = waiting[position:]
                _LOG.warning("metrics of step %d are not recorded yet: %s", number, error)
                return

    def metrics(self) -> dict[int, dict[str, float]]:
        """All metrics by step."""
        known = self._database.metrics()
        for step, metrics, _ in self._unrecorded:
            known[step] = known.get(step, {}) | dict(metrics)
        return known

    def _folder(self, number: int) -> Path:
        return self.steps_path / folder_name(number)


@contextmanager
def _writing(what: str, path: Path) -> Iterator[None]:
    """Errors of the disk as StoreError: a full one, one that takes no files any more."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{what} could not be written to {path}: {error.strerror or error}; older steps are as they were: make room there, or "
            "make the folder writable, and run again"
        ) from error


def published_steps(run: Path) -> list[int]:
    """Numbers of the steps published under a run's folder, ascending; takes no lock."""
    return sorted(int(folder.name) for folder in _step_folders(run) if (folder / MANIFEST).is_file())


def read_checkpoint(run: Path, number: int | None) -> tuple[dict[str, Any], RunCheckpoint]:
    """A run's identity and one of its published steps, the last if `number` is None. Takes no lock.

    Raises StoreError if the folder is not a run, or the step is not published or damaged.
    """
    run = run.expanduser().resolve()
    identity = read_identity(run)
    steps = published_steps(run)
    if not steps:
        raise StoreError(f"{run} has no published step yet")
    return identity, _read_step(run, steps[-1] if number is None else number)


def _read_step(run: Path, number: int) -> RunCheckpoint:
    folder = run / "steps" / folder_name(number)
    if not (folder / MANIFEST).is_file():
        removed = " any more" if (run / "removed" / f"{folder.name}.json").is_file() else ""
        raise StoreError(
            f"step {number} is not published in {run}{removed}: it has {published_steps(run) or 'no steps'}"
        )
    return read_checked(number, folder)


def _step_folders(run: Path) -> list[Path]:
    return sorted(folder for folder in (run / "steps").glob("*") if _NUMBER.fullmatch(folder.name))


def folder_name(number: int) -> str:
    return f"{number:04d}"
