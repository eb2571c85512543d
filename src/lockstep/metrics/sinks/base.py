"""The form of a metrics sink: what it hears of the run, and what it does with metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class SinkRun:
    """A run as a sink sees it.

    path: the run's folder.
    key: of this run among all runs. A resumed run keeps its key; a run that starts anew under the
        same name has another one.
    settings: the run's settings by name, plain values.
    """

    path: Path
    project: str
    name: str
    key: str
    settings: Mapping[str, Any]


class Sink(Protocol):
    """Takes the metrics of one run. All calls come from one thread. An error ends the sink, never the
    run.
    """

    @property
    def last_step(self) -> int | None:
        """The last step that the sink holds when it opens; -1: none yet. The steps after it are
        written again from the run's SQLite file. None: not known, nothing is written again.
        """
        ...

    def write(self, step: int, metrics: Mapping[str, float], wall_time: float) -> None:
        """Add metrics to a step. A step comes in several parts, with each value once.

        metrics: finite values, by their names in `metrics/names.py`.
        wall_time: seconds since 1970 at which the values were recorded.
        """
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


@dataclass(frozen=True)
class SinkKind:
    """One kind of sink.

    name: as in the setting `sinks`.
    open: makes the sink of a run.
    package: that `open` imports; None: it needs none.
    problem: says in one line why a sink could not open, such as a missing key; None: it could.
    """

    name: str
    open: Callable[[SinkRun], Sink]
    package: str | None = None
    problem: Callable[[], str | None] = lambda: None
