"""List the published steps of a run, and delete some."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lockstep.errors import StoreError
from lockstep.runs.database import read_jobs, read_metrics, read_references, read_settings
from lockstep.runs.retention import Retention, kept_steps, manifest_of, remove
from lockstep.runs.store import RunStore, published_steps

_SETTINGS = ("keep_newest", "keep_best", "keep_every", "keep_optimizer_states")
"""In the order of `Retention`'s fields."""


def show_steps(run: Path, console: Console) -> None:
    """One line a step: number, time, size, whether training can go on from there, rewards, and why
    the step is kept.
    """
    run = run.expanduser().resolve()
    metrics, references = read_metrics(run), read_references(run)
    steps = published_steps(run)
    kept = _kept(read_settings(run), steps, metrics)
    table = Table(box=None, pad_edge=False)
    for name in ("step", "published", "MB", "optimizer", "reward", "greedy", "kept as"):
        table.add_column(name, justify="left" if name in ("published", "kept as") else "right")
    for step in steps:
        folder, values = run / "steps" / f"{step:04d}", metrics.get(step, {})
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        table.add_row(
            str(step),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest_of(run, step)["published"])),
            f"{size / 1e6:.1f}",
            "yes" if (folder / "trainer").is_dir() else "no",
            *(_number(values.get(name)) for name in ("reward", "greedy_reward")),
            "KL reference" if step in references else kept.get(step, ""),
        )
    console.print(table)


def show_jobs(run: Path, console: Console) -> None:
    """One line a job: its id, state, age of its last sign of life, what it is busy with or why it
    failed.
    """
    table = Table(box=None, pad_edge=False)
    for name in ("job", "state", "asked for", "seconds", "last sign", "busy with, or failed by"):
        table.add_column(name)
    for job in read_jobs(run):
        ended = job.ended or time.time()
        busy = job.phase + (f", waits for {job.waits_for}" if job.waits_for else "")
        table.add_row(
            job.id,
            job.state,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.created)),
            f"{ended - (job.claimed or job.created):.1f}",
            f"{time.time() - job.beaten:.0f} s ago" if job.beaten and job.state == "running" else "",
            Text(f"{job.error_type}: {job.error}" if job.state == "failed" else busy),
        )
    console.print(table)


def delete_steps(run: Path, steps: Sequence[int], console: Console) -> None:
    """Delete published steps; their metrics and manifests stay.

    Raises StoreError, before anything is deleted, for a run in use, the last step, a KL reference,
    or an unpublished step.
    """
    run = run.expanduser().resolve()
    read_settings(run)  # a folder that is no run is not made one
    store = RunStore(run.parents[1], run.parent.name, run.name)
    try:
        published, references = store.published(), store.references()
        for step in steps:
            if step not in published:
                raise StoreError(f"step {step} is not published in {run}: it has {published or 'no steps'}")
            if step == published[-1]:
                raise StoreError(
                    f"step {step} is the last one of {run}, which the run goes on from: it can't be deleted"
                )
            if step in references:
                raise StoreError(f"step {step} of {run} is a KL reference of the run: it can't be deleted")
        for step in dict.fromkeys(steps):
            said = "deleted" if remove(store, step) else "is being read by another process and stays"
            console.print(f"step {step} {said}", markup=False, highlight=False)
    finally:
        store.close()


def _kept(settings: dict[str, Any], steps: list[int], metrics: dict[int, dict[str, float]]) -> dict[int, str]:
    """Why each step stays, by what the run was started with last; empty for a run that removes
    none.
    """
    if any(name not in settings for name in _SETTINGS):
        return {}
    first = {0} if "lora.rank" in settings else set()
    return kept_steps(Retention(*(settings[name] for name in _SETTINGS)), steps, metrics, first)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"
