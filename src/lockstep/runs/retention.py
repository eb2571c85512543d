"""The published steps that a run keeps (the newest, the best, every n-th, and those still needed),
and the removal of others.

A step loses its name first, so a process that ends on the way leaves complete steps only. The next
start clears the rest away. One that loses its optimizer state alone is marked before.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import StoreError
from lockstep.metrics.names import EARLIER
from lockstep.process.durable import fsync, replacing
from lockstep.runs.checkpoint import MANIFEST, STATELESS, RunCheckpoint
from lockstep.runs.store import REMOVED, RunStore, folder_name, published_steps


@dataclass(frozen=True)
class Retention:
    """newest: how many of the last steps stay.
    best: the step with the highest value of this metric stays, None: no such rule.
    every: steps whose number is a multiple stay, None: none.
    states: kept steps keep their optimizer state, not only the newest.
    """

    newest: int = 3
    best: str | None = None
    every: int | None = None
    states: bool = False


def kept_steps(
    rule: Retention, steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]], needed: Collection[int] = ()
) -> dict[int, str]:
    """The steps of `steps`, ascending, that stay, each with the reason.

    needed: steps that stay whatever the rule says.
    """
    kept = {step: "needed" for step in steps if step in needed}
    if rule.every is not None:
        kept |= {step: f"every {rule.every}" for step in steps if step % rule.every == 0}
    if rule.best is not None:
        values = {step: value for step in steps if math.isfinite(value := _value(metrics, step, rule.best))}
        if values:
            kept[max(values, key=lambda step: (values[step], step))] = f"best {rule.best}"
    return dict(sorted((kept | dict.fromkeys(steps[-rule.newest :], "newest")).items()))


def _value(metrics: Mapping[int, Mapping[str, float]], step: int, name: str) -> float:
    value = metrics.get(step, {}).get(EARLIER.get(name, name))
    return math.nan if value is None else value


def prune(store: RunStore, rule: Retention, needed: Collection[int], full_weights: bool) -> list[int]:
    """Remove what the rule does not keep, oldest first; the steps that were removed.

    needed: steps that are served, or that running rollouts hold.
    full_weights: a KL reference is read from its optimizer state, which stays then. A process that
        ends on the way leaves whole steps only.
    """
    steps, references = store.published(), store.references()
    kept = kept_steps(rule, steps, store.metrics(), {*needed, *references})
    removed = [step for step in steps if step not in kept and remove(store, step)]
    if not rule.states:
        for step in set(kept) - set(steps[-1:]) - (references if full_weights else set()):
            if not (store.steps_path / folder_name(step) / STATELESS).exists():
                remove_state(store, step)
    return removed


def remove(store: RunStore, number: int) -> bool:
    """Remove a published step, and keep its manifest and metrics. False: another process is reading
    the step, which stays.

    Raises StoreError for the last step, which the run goes on from, and for one that is not
    published.
    """
    folder = store.steps_path / folder_name(number)
    with _unread(store.path, number) as free:
        if number == store.published()[-1]:
            raise StoreError(
                f"step {number} is the last one of {store.path}, which the run goes on from: it can't be deleted"
            )
        if not free:
            return False
        _keep_manifest(store.path, number)
        gone = store.steps_path / f"{REMOVED}{folder.name}-{os.getpid()}"
        folder.rename(gone)
        fsync(store.steps_path)
        shutil.rmtree(gone)
    return True


def remove_state(store: RunStore, number: int) -> bool:
    """Remove a step's optimizer state, which only going on from there needs. False: another process
    is reading the step.
    """
    folder = store.steps_path / folder_name(number)
    with _unread(store.path, number) as free:
        if not free:
            return False
        (folder / STATELESS).touch()
        fsync(folder)
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    return True


def manifest_of(run: Path, number: int) -> dict[str, Any]:
    """The manifest of a step, also of one that was removed. Raises StoreError for a step that never
    was. Takes no lock.
    """
    name = folder_name(number)
    for file in (run / "steps" / name / MANIFEST, run / "removed" / f"{name}.json"):
        if file.is_file():
            return json.loads(file.read_text())
    raise StoreError(f"step {number} was never published in {run}")


@contextmanager
def reading(step: RunCheckpoint) -> Iterator[None]:
    """While the block runs no process removes the step. Raises StoreError if one did already."""
    gone = f"{step.path} was removed meanwhile: choose another step"
    try:
        file = (step.path / MANIFEST).open()
    except FileNotFoundError:
        raise StoreError(gone) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        if not (step.path / MANIFEST).is_file():
            raise StoreError(gone)
        yield


@contextmanager
def _unread(run: Path, number: int) -> Iterator[bool]:
    """True if nobody is `reading` the step, and nobody begins to while the block runs."""
    manifest = run / "steps" / folder_name(number) / MANIFEST
    if not manifest.is_file():
        raise StoreError(f"step {number} is not published in {run}: it has {published_steps(run) or 'no steps'}")
    with manifest.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free


def _keep_manifest(run: Path, number: int) -> None:
    folder, name = run / "removed", folder_name(number)
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{name}.json") as temporary:
        shutil.copyfile(run / "steps" / name / MANIFEST, temporary)
    fsync(folder)
