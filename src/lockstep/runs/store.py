"""A run on disk: immutable steps published atomically, metrics in one SQLite file, logs and trajectories beside them.

    <path>/<project>/<name>/
        run.sqlite            what the run is (base model, LoRA), metrics of each step
        run.lock              held by the process that trains the run
        steps/0003/           adapter/, trainer/, manifest.json (SHA-256 of every file); never changed once it has this name
        trajectories/ logs/ batches/

A step is written under a temporary name, flushed to disk, and renamed. Whatever still has a temporary name was never published.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from lockstep.errors import StoreError

MANIFEST = "manifest.json"
SCHEMA = 1
_STAGING = ".staging-"
_NUMBER = re.compile(r"[0-9]{4,}")


@dataclass(frozen=True)
class RunCheckpoint:
    """A published step: `number`, its folder, and the manifest it was published with."""

    number: int
    path: Path
    manifest: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def trainer(self) -> Path:
        return self.path / "trainer"

    @property
    def state(self) -> Mapping[str, Any]:
        """What the caller stored with the step (position in the data, and the like)."""
        return self.manifest["state"]


class RunStore:
    """The folder of one run. One process at a time may hold it open; readers use `published_steps`."""

    def __init__(self, path: str | Path, project: str, name: str):
        self.path = Path(path).expanduser().resolve() / project / name
        self.steps_path = self.path / "steps"
        try:
            for folder in (self.steps_path, self.path / "logs", self.path / "batches"):
                folder.mkdir(parents=True, exist_ok=True)
            (self.path / "logs").chmod(0o700)
            self._lock = FileLock(self.path / "run.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"{self.path} is in use by another process: stop that run, or choose another name or path"
            ) from None
        except OSError as error:
            raise StoreError(f"{self.path} can't be written ({error.strerror}): choose another path") from None
        try:
            self._remove_unpublished()
            self._make_tables()
        except BaseException:
            self.close()
            raise

    def _make_tables(self) -> None:
        with self._database() as database:
            database.executescript(
                "CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT NOT NULL);"
                "CREATE TABLE IF NOT EXISTS metrics (step INTEGER NOT NULL, name TEXT NOT NULL, value REAL,"
                " PRIMARY KEY (step, name));"
                "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);"
                "CREATE TABLE IF NOT EXISTS server_starts (number INTEGER PRIMARY KEY);"
            )

    def close(self) -> None:
        self._lock.release()

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with _named(self.path / "run.sqlite") as file, closing(sqlite3.connect(file, timeout=30)) as database, database:
            yield database

    def _remove_unpublished(self) -> None:
        for leftover in self.steps_path.glob(f"{_STAGING}*"):
            shutil.rmtree(leftover)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Record what this run trains; raise StoreError if the folder already belongs to something else."""
        with self._database() as database:
            known = dict(database.execute("SELECT key, value FROM identity"))
            for key, value in identity.items():
                text = json.dumps(value, sort_keys=True)
                if key in known and known[key] != text:
                    raise StoreError(
                        f"{self.path} was started with {key} = {known[key]}, not {text}: "
                        "use the same setting, or another model name or path"
                    )
                database.execute("INSERT OR IGNORE INTO identity VALUES (?, ?)", (key, text))

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        """Record what the run was started with this time; a later start may differ, and replaces it."""
        with self._database() as database:
            database.execute("DELETE FROM settings")
            database.executemany(
                "INSERT INTO settings VALUES (?, ?)",
                [(name, json.dumps(value)) for name, value in settings.items()],
            )

    def next_server_start(self) -> int:
        """Count one more start of the run's server; how many there were before, in all processes that worked on the run."""
        with self._database() as database:
            (before,) = database.execute("SELECT COUNT(*) FROM server_starts").fetchone()
            database.execute("INSERT INTO server_starts VALUES (?)", (before,))
        return before

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

    def stage(self, number: int) -> Path:
        """An empty folder to write step `number` into before `publish`."""
        folder = self.steps_path / f"{_STAGING}{_folder_name(number)}-{os.getpid()}"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def publish(
        self, number: int, staged: Path, metrics: Mapping[str, float], state: Mapping[str, Any] | None = None
    ) -> RunCheckpoint:
        """Make a staged folder step `number`: digests, flush, rename, flush. All or nothing.

        Raises StoreError if the step exists or leaves a gap.
        """
        numbers = self.published()
        if number != (numbers[-1] + 1 if numbers else 0):
            raise StoreError(f"step {number} can't follow {numbers[-1] if numbers else 'nothing'} in {self.path}")
        files = {}
        for file in _files(staged):
            _fsync(file)
            files[str(file.relative_to(staged))] = _sha256(file)
        manifest = {
            "schema": SCHEMA,
            "step": number,
            "published": time.time(),
            "files": files,
            "metrics": dict(metrics),
            "state": dict(state or {}),
        }
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False))
        _fsync(staged / MANIFEST)
        for folder in [staged, *(child for child in staged.rglob("*") if child.is_dir())]:
            _fsync(folder)
        final = self.steps_path / _folder_name(number)
        staged.rename(final)
        _fsync(self.steps_path)
        self.record(number, metrics)
        return RunCheckpoint(number, final, manifest)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to a step (a later value of the same name replaces the earlier)."""
        with self._database() as database:
            database.executemany(
                "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)",
                [(step, name, value) for name, value in metrics.items()],
            )

    def metrics(self) -> dict[int, dict[str, float]]:
        """All recorded metrics by step."""
        rows: dict[int, dict[str, float]] = {}
        with self._database() as database:
            for step, name, value in database.execute("SELECT step, name, value FROM metrics ORDER BY step, name"):
                rows.setdefault(step, {})[name] = value
        return rows


@contextmanager
def _named(file: Path) -> Iterator[Path]:
    """Errors of SQLite as StoreError, with the file's name: damaged, read-only, or a full disk."""
    try:
        yield file
    except sqlite3.Error as error:
        raise StoreError(
            f"{file}: {error}; if it is damaged, restore it, or choose another model name or path"
        ) from None


def published_steps(run: Path) -> list[int]:
    """Numbers of the steps published under a run's folder, ascending; takes no lock."""
    folders = (folder for folder in (run / "steps").glob("*") if _NUMBER.fullmatch(folder.name))
    return sorted(int(folder.name) for folder in folders if (folder / MANIFEST).is_file())


def read_settings(run: Path) -> dict[str, Any]:
    """What the run was started with last, by name; empty for a run of an older version. Takes no lock."""
    with _read_only(run.expanduser().resolve()) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'settings'").fetchone():
            return {}
        return {name: json.loads(value) for name, value in database.execute("SELECT name, value FROM settings")}


@contextmanager
def _read_only(run: Path) -> Iterator[sqlite3.Connection]:
    """The run's database. Raises StoreError if the folder is no run."""
    if not (run / "run.sqlite").is_file():
        raise StoreError(f"{run} is no run: give the folder PATH/PROJECT/NAME that holds run.sqlite and steps")
    with (
        _named(run / "run.sqlite") as file,
        closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=30)) as database,
    ):
        yield database


def read_checkpoint(run: Path, number: int | None) -> tuple[dict[str, Any], RunCheckpoint]:
    """What a run trains (its identity) and one of its published steps, the last if `number` is None; takes no lock.

    Raises StoreError if the folder is no run, or the step is not published or damaged.
    """
    run = run.expanduser().resolve()
    with _read_only(run) as database:
        identity = {key: json.loads(value) for key, value in database.execute("SELECT key, value FROM identity")}
    steps = published_steps(run)
    if not steps:
        raise StoreError(f"{run} has no published step yet")
    return identity, _read_step(run, steps[-1] if number is None else number)


def _read_step(run: Path, number: int) -> RunCheckpoint:
    folder = run / "steps" / _folder_name(number)
    if not (folder / MANIFEST).is_file():
        raise StoreError(f"step {number} is not published in {run}: it has {published_steps(run) or 'no steps'}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        raise StoreError(
            f"{folder / MANIFEST} is no JSON: the step is damaged; delete {folder} to resume before it"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise StoreError(f"{folder / MANIFEST} is not of schema {SCHEMA}, which this version reads")
    found = {str(file.relative_to(folder)) for file in _files(folder)}
    for name, digest in manifest["files"].items():
        if name not in found:
            raise StoreError(f"{folder / name} is missing: the step is damaged; delete {folder} to resume before it")
        if _sha256(folder / name) != digest:
            raise StoreError(f"{folder / name} was changed after it was published; delete {folder} to resume before it")
    if extra := found - set(manifest["files"]):
        raise StoreError(f"{folder}: {sorted(extra)[0]} is not in the manifest; steps are immutable, remove the file")
    return RunCheckpoint(number, folder, manifest)


def _folder_name(number: int) -> str:
    return f"{number:04d}"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
