"""Jobs of a run: what the backend asks of trainer and server, one row each in the run's SQLite
file.

A job is known by (step, kind, attempt) and carries a digest of its input. It is queued, then
running under one claim, then done or failed with a typed error. "done" and the step's metrics are
one transaction. A row holds no secret: addresses and tokens stay in memory. Whoever opens the run
next finds what a process that was killed left running, and says so.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

from lockstep.errors import StoreError

SCHEMA = 1
Kind = Literal["first_sync", "lora_step", "merged_step", "sft_step", "restarted_sync"]
"""first_sync: of a run that is registered. restarted_sync: into a server that took the place of a
lost one. sft_step: on chats, whatever way the weights travel.
"""
STEPS: tuple[Kind, ...] = ("lora_step", "merged_step", "sft_step")
"""Kinds that make a step: each step is made once."""
State = Literal["queued", "running", "done", "failed"]
INTERRUPTED = "Interrupted"
"""The error type of a job whose process ended."""
TABLE = (
    "CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, schema INTEGER NOT NULL, step INTEGER NOT NULL,"
    " kind TEXT NOT NULL, attempt INTEGER NOT NULL, digest TEXT NOT NULL, state TEXT NOT NULL"
    " CHECK (state IN ('queued', 'running', 'done', 'failed')), phase TEXT NOT NULL DEFAULT '',"
    " waits_for TEXT NOT NULL DEFAULT '', error_type TEXT, error TEXT, created REAL NOT NULL, claimed REAL, beaten REAL,"
    " ended REAL, UNIQUE (step, kind, attempt));"
)
_COLUMNS = "id, schema, step, kind, attempt, digest, state, phase, waits_for, error_type, error, created, claimed, beaten, ended"


@dataclass(frozen=True)
class Job:
    """One row. Times are seconds since 1970;

    `beaten`: the last sign of life, with `phase` and what the phase waits for.
    """

    id: str
    schema: int
    step: int
    kind: Kind
    attempt: int
    digest: str
    state: State
    phase: str
    waits_for: str
    error_type: str | None
    error: str | None
    created: float
    claimed: float | None
    beaten: float | None
    ended: float | None


class JobTable:
    """The jobs of one run, as the process that holds the run's lock sees them. Each method is one
    transaction.
    """

    def __init__(self, transaction: Callable[[], AbstractContextManager[sqlite3.Connection]]):
        self._transaction = transaction

    def submit(self, step: int, kind: Kind, digest: str) -> Job:
        """A new attempt, queued; or the job that is done already, if its input was the same.

        Raises StoreError where the step was made from another input, or is under way.
        """
        if kind not in get_args(Kind):
            raise StoreError(f"no job is a {kind!r}: known are {', '.join(get_args(Kind))}")
        with self._transaction() as database:
            before = _selected(database, "step = ? AND kind = ?", (step, kind))
            for job in before:
                if job.state in ("queued", "running"):
                    raise StoreError(f"job {job.id} is {job.state}: it can't be asked for again")
                if job.state == "done" and job.digest == digest:
                    return job
                if job.state == "done" and kind in STEPS:
                    raise StoreError(f"job {job.id} made step {step} from another batch: a step is made once")
            attempt = max((job.attempt for job in before), default=0) + 1
            identity = f"{step:04d}-{kind}-{attempt}"
            database.execute(
                "INSERT INTO jobs (id, schema, step, kind, attempt, digest, state, created)"
                " VALUES (?, ?, ?, ?, ?, ?, 'queued', ?)",
                (identity, SCHEMA, step, kind, attempt, digest, time.time()),
            )
            return _get(database, identity)

    def claim(self, identity: str) -> None:
        """Take a queued job. Raises StoreError for one that was taken before."""
        now = time.time()
        with self._transaction() as database:
            taken = database.execute(
                "UPDATE jobs SET state = 'running', claimed = ?, beaten = ? WHERE id = ? AND state = 'queued'",
                (now, now, identity),
            )
            if taken.rowcount != 1:
                raise StoreError(f"job {identity} is {_get(database, identity).state}, not queued: it is done once")

    def beat(self, identity: str, phase: str, waits_for: str) -> None:
        """A sign of life of a running job; any other is left as it is."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET beaten = ?, phase = ?, waits_for = ? WHERE id = ? AND state = 'running'",
                (time.time(), phase, waits_for, identity),
            )

    def finish(self, identity: str) -> None:
        """A job without metrics is done; harmless for one that is. `RunDatabase.record` finishes a
        step's job.
        """
        with self._transaction() as database:
            finish(database, identity)

    def fail(self, identity: str, error_type: str, error: str) -> None:
        """The job has failed. One that is done stays so: a step that was published is not unmade by
        what comes after.
        """
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'failed', error_type = ?, error = ?, ended = ?"
                " WHERE id = ? AND state IN ('queued', 'running')",
                (error_type, error, time.time(), identity),
            )

    def interrupt(self, last_step: int) -> None:
        """What is queued or running belonged to a process that has ended.

        last_step: a step after that was deleted, and is made again.
        """
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'failed', error_type = 'Deleted', error = 'its step was deleted'"
                f" WHERE state = 'done' AND step > ? AND kind IN ({', '.join('?' * len(STEPS))})",
                (last_step, *STEPS),
            )
            database.execute(
                "UPDATE jobs SET state = 'failed', error_type = ?, error = 'its process ended', ended = ?"
                " WHERE state IN ('queued', 'running')",
                (INTERRUPTED, time.time()),
            )

    def listed(self) -> list[Job]:
        """All jobs, in the order in which they were asked for."""
        with self._transaction() as database:
            return listed(database)


def finish(database: sqlite3.Connection, identity: str) -> None:
    """Within a transaction of the caller's."""
    database.execute(
        "UPDATE jobs SET state = 'done', phase = '', waits_for = '', error_type = NULL, error = NULL, ended = ?"
        " WHERE id = ? AND state != 'done'",
        (time.time(), identity),
    )


def listed(database: sqlite3.Connection) -> list[Job]:
    """All jobs, in the order in which they were asked for."""
    return _selected(database, "true", ())


def _get(database: sqlite3.Connection, identity: str) -> Job:
    jobs = _selected(database, "id = ?", (identity,))
    if not jobs:
        raise StoreError(f"there is no job {identity}")
    return jobs[0]


def _selected(database: sqlite3.Connection, condition: str, values: tuple[object, ...]) -> list[Job]:
    query = f"SELECT {_COLUMNS} FROM jobs WHERE {condition} ORDER BY created, rowid"
    return [Job(*row) for row in database.execute(query, values)]
