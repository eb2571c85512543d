"""All that a report reads of a run but its transcripts. Takes no lock."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.cli.report.advice import Advice, advice
from lockstep.cli.report.mask import masked
from lockstep.runs.database import read_identity, read_jobs, read_metrics, read_settings
from lockstep.runs.jobs import Job
from lockstep.runs.retention import manifest_of
from lockstep.runs.store import published_steps


@dataclass(frozen=True)
class RunRecord:
    """metrics: by step, then by name.
    published_at: seconds since 1970 by step, also of steps that were removed.
    """

    path: Path
    identity: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[int, dict[str, float]]
    published_at: dict[int, float]
    jobs: list[Job] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def advice(self) -> list[Advice]:
        return advice(self.metrics)


def read_run(run: Path) -> RunRecord:
    """Raises StoreError for a folder that is no run, or a damaged file."""
    run = run.expanduser().resolve()
    steps = {*published_steps(run), *(int(file.stem) for file in (run / "removed").glob("[0-9]*.json"))}
    return RunRecord(
        path=run,
        identity=masked(read_identity(run)),
        settings=masked(read_settings(run)),
        metrics=read_metrics(run),
        published_at={step: float(manifest_of(run, step)["published"]) for step in sorted(steps)},
        jobs=read_jobs(run),
    )
