"""A run's SQLite file: what the run is, its settings, and its metrics.

Write-ahead logging: readers never wait for the process that trains. Whoever opens the file next
undoes a commit that was cut off.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lockstep.config import deadlines
from lockstep.errors import StoreError
from lockstep.metrics.names import EARLIER
from lockstep.runs import jobs
from lockstep.runs.jobs import Job, JobTable

FILE = "run.sqlite"
_LEAST_ROOM = 256 << 10
"""Bytes that SQLite wants for its log and shared memory."""
_TABLES = (
    "CREATE TABLE IF NOT EXISTS identity (key TEXT PRIMARY KEY, value TEXT NOT NULL);"
    "CREATE TABLE IF NOT EXISTS metrics (step INTEGER NOT NULL, name TEXT NOT NULL, value REAL,"
    " PRIMARY KEY (step, name));"
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);"
    "CREATE TABLE IF NOT EXISTS server_starts (number INTEGER PRIMARY KEY);"
    "CREATE TABLE IF NOT EXISTS kl_references (step INTEGER PRIMARY KEY);"
) + jobs.TABLE


class RunDatabase:
    """The file as the process that trains the run sees it. Every error is a StoreError that names
    the file.
    """

    def __init__(self, run: Path) -> None:
        """Make the tables that are missing. Raises StoreError for a damaged file."""
        self.file = run / FILE
        with self._open() as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(_TABLES)
            [problem] = database.execute("PRAGMA quick_check(1)").fetchone()
            if problem != "ok":
                raise StoreError(
                    f"{self.file} is damaged ({problem}): restore it, or choose another model name or path"
                )
        self.jobs = JobTable(self._open)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        with _named(self.file), closing(sqlite3.connect(self.file, timeout=deadlines.DATABASE_S)) as database, database:
            database.execute("PRAGMA synchronous = FULL")
            yield database

    def identity(self) -> dict[str, Any]:
        with self._open() as database:
            return _values(self.file, database, "identity", "key")

    def add_identity(self, identity: Mapping[str, Any]) -> None:
        """Keep what is not known yet; what is known stays."""
        with self._open() as database:
            database.executemany("INSERT OR IGNORE INTO identity VALUES (?, ?)", _rows(identity))

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        with self._open() as database:
            database.execute("DELETE FROM settings")
            database.executemany("INSERT INTO settings VALUES (?, ?)", _rows(settings))

    def next_server_start(self) -> int:
        with self._open() as database:
            (before,) = database.execute("SELECT COUNT(*) FROM server_starts").fetchone()
            database.execute("INSERT INTO server_starts VALUES (?)", (before,))
        return before

    def record(self, step: int, metrics: Mapping[str, float], job: str | None = None) -> None:
        """job: that made the step; it is done in the same transaction."""
        with self._open() as database:
            rows = [(step, name, value) for name, value in metrics.items()]
            database.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", rows)
            if job is not None:
                jobs.finish(database, job)

    def metrics(self) -> dict[int, dict[str, float]]:
        with self._open() as database:
            return _metrics(database)

    def add_reference(self, step: int) -> None:
        with self._open() as database:
            database.execute("INSERT OR IGNORE INTO kl_references VALUES (?)", (step,))

    def references(self) -> set[int]:
        with self._open() as database:
            return _references(database)


def read_identity(run: Path) -> dict[str, Any]:
    """The identity of what a run trains. Takes no lock. Raises StoreError if the folder is not a
    run.
    """
    with _reading(run) as database:
        return _values(run / FILE, database, "identity", "key")


def read_settings(run: Path) -> dict[str, Any]:
    """The settings of the run's last start, by name; empty for a run of an older version. Takes no
    lock.
    """
    run = run.expanduser().resolve()
    with _reading(run) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'settings'").fetchone():
            return {}
        return _values(run / FILE, database, "settings", "name")


def read_metrics(run: Path) -> dict[int, dict[str, float]]:
    """All recorded metrics by step, also of steps that were removed. Takes no lock."""
    with _reading(run) as database:
        return _metrics(database)


def read_references(run: Path) -> set[int]:
    """Steps that a KL penalty of the run has pulled towards; none for a run of an older version.
    Takes no lock.
    """
    with _reading(run) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'kl_references'").fetchone():
            return set()
        return _references(database)


def read_jobs(run: Path) -> list[Job]:
    """All jobs in the order in which they were asked for; none for a run of an older version. Takes
    no lock.
    """
    run = run.expanduser().resolve()
    with _reading(run) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone():
            return []
        return jobs.listed(database)


def _metrics(database: sqlite3.Connection) -> dict[int, dict[str, float]]:
    metrics: dict[int, dict[str, float]] = {}
    for step, name, value in database.execute("SELECT step, name, value FROM metrics ORDER BY step, name"):
        metrics.setdefault(step, {})[EARLIER.get(str(name), str(name))] = value
    return metrics


def _references(database: sqlite3.Connection) -> set[int]:
    return {number for (number,) in database.execute("SELECT step FROM kl_references")}


@contextmanager
def _reading(run: Path) -> Iterator[sqlite3.Connection]:
    if not (run / FILE).is_file():
        raise StoreError(f"{run} is not a run: give the folder PATH/PROJECT/NAME that holds {FILE} and steps")
    with _named(run / FILE), closing(_connected(run / FILE)) as database:
        yield database


def _connected(file: Path) -> sqlite3.Connection:
    """Read-only, or, where a commit was cut off and has to be undone first, for writing too."""
    database = sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=deadlines.DATABASE_S)
    try:
        database.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        database.close()
        return sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=deadlines.DATABASE_S)
    return database


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of SQLite as StoreError, with the file's name: damaged, read-only, or a full disk."""
    try:
        yield
    except sqlite3.Error as error:
        # Without room for its shared memory SQLite calls a full disk an I/O error.
        if "full" in str(error) or ("I/O" in str(error) and _is_full(file)):
            raise StoreError(f"{file}: database or disk is full: make room on that disk and run again") from None
        if "readonly" in str(error):
            raise StoreError(f"{file}: {error}: make the run's folder writable and run again") from None
        raise StoreError(
            f"{file}: {error}; if it is damaged, restore it, or choose another model name or path"
        ) from None


def _is_full(file: Path) -> bool:
    disk = os.statvfs(file.parent)
    return disk.f_bavail * disk.f_frsize < _LEAST_ROOM


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, json.dumps(value, sort_keys=True)) for name, value in values.items()]


def _values(file: Path, database: sqlite3.Connection, table: str, key: str) -> dict[str, Any]:
    values = {}
    for name, text in database.execute(f"SELECT {key}, value FROM {table}"):
        try:
            values[name] = json.loads(text)
        except ValueError:
            raise StoreError(
                f"{file} is damaged: {table} has {name} = {text!r}, which is not JSON; restore it, or choose another name"
            ) from None
    return values
