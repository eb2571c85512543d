"""The spans of a run as a file that Perfetto (https://ui.perfetto.dev) opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from lockstep.cli.report.record import read_run
from lockstep.errors import ConfigError
from lockstep.metrics.spans import FILE, Span, read_spans


def write_trace(run: Path, output: Path | None, console: Console) -> None:
    """output: None writes RUN/trace.json.

    Raises ConfigError for a run without spans, StoreError for a folder that is no run.
    """
    record = read_run(run)
    spans = read_spans(record.path)
    if not spans:
        raise ConfigError(f"{record.path} has no {FILE}: an older version of Lockstep made the run")
    file = (record.path / "trace.json" if output is None else output).expanduser().resolve()
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"--output {output}: give a file in a folder that exists")
    events = trace_events(record.name, spans)
    file.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n", encoding="utf-8")
    console.print(f"{file}  {len(spans)} spans: open it in https://ui.perfetto.dev", markup=False, soft_wrap=True)


def trace_events(name: str, spans: list[Span]) -> list[dict[str, Any]]:
    """Events of the Trace Event format: a track for each name, and further ones where spans of a name
    overlap, as rollouts do in a pipeline.
    """
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": name}}]
    ends: dict[tuple[str, int], float] = {}
    tracks: dict[tuple[str, int], int] = {}
    for span in sorted(spans, key=lambda span: span.start):
        lane = 0
        while ends.get((span.name, lane), 0.0) > span.start:
            lane += 1
        track = tracks.setdefault((span.name, lane), len(tracks) + 1)
        ends[span.name, lane] = span.start + span.seconds
        place = {"pid": 1, "tid": track, "ts": span.start * 1e6, "dur": span.seconds * 1e6}
        events.append(
            {"name": f"{span.name} {span.step}", "cat": span.name, "ph": "X", **place, "args": {"step": span.step}}
        )
    for (kind, lane), track in tracks.items():
        label = f"{kind} {lane + 1}" if lane else kind
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": label}})
    return events
