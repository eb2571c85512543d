"""When rollouts, training, syncs and evaluations happened.

Each span is a line of RUN/spans.jsonl, which `lockstep trace` turns into a file for Perfetto. Where
the package `opentelemetry-api` is installed it is an OpenTelemetry span as well, of whatever tracer
provider the program has.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "spans.jsonl"


@dataclass(frozen=True)
class Span:
    """start: seconds since 1970."""

    name: str
    step: int
    start: float
    seconds: float


@contextmanager
def span(run: Path, name: str, step: int) -> Iterator[None]:
    """The block is a span of the run; also one that raises. A full disk loses spans and stops nothing."""
    start, clock = time.time(), time.monotonic()
    with _telemetry(run, name, step):
        try:
            yield
        finally:
            done = Span(name, step, start, time.monotonic() - clock)
            with contextlib.suppress(OSError), (run / FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(done)) + "\n")


def read_spans(run: Path) -> list[Span]:
    """In the order in which they ended. A line that a kill cut off is left out."""
    file, spans = run / FILE, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError, TypeError):
            spans.append(Span(**json.loads(line)))
    return spans


def _telemetry(run: Path, name: str, step: int) -> AbstractContextManager[object]:
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        return nullcontext()
    attributes = {"lockstep.run": f"{run.parent.name}/{run.name}", "lockstep.step": step}
    return trace.get_tracer("lockstep").start_as_current_span(f"lockstep.{name}", attributes=attributes)
