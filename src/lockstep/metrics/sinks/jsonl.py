"""`metrics.jsonl` in the run's folder: a JSON object a line, for `jq`, pandas and spreadsheets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lockstep.metrics.sinks.base import SinkKind, SinkRun

FILE = "metrics.jsonl"


class JsonLines:
    """Appends. A kill costs nothing: the next start removes a last line that was cut off, and writes
    the last step again. A later value of a step replaces the earlier.
    """

    def __init__(self, path: Path):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith(b"\n")]
        self.last_step: int | None = max((int(json.loads(line)["step"]) for line in complete), default=0) - 1
        self._out = path.open("ab")
        self._out.truncate(sum(map(len, complete)))

    def write(self, step: int, metrics: Mapping[str, float], wall_time: float) -> None:
        row = {"step": step, "wall_time": round(wall_time, 3), **metrics}
        self._out.write(json.dumps(row).encode() + b"\n")
        self._out.flush()

    def close(self) -> None:
        self._out.close()


def open_sink(run: SinkRun) -> JsonLines:
    return JsonLines(run.path / FILE)


SINK = SinkKind("jsonl", open_sink)
