"""Metrics on their way to the sinks of a run. A sink that fails, hangs or falls behind gets one
warning and no more metrics; it never stops or delays a step.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence

from lockstep.config import deadlines
from lockstep.metrics.sinks.base import SinkKind, SinkRun

_LOG = logging.getLogger(__name__)
_WAITING = 1000
"""Parts of steps that a sink may be behind."""

_Part = tuple[int, dict[str, float], float]
"""A step, metrics of it, and the wall time in seconds since 1970."""


class Feeds:
    """The feeds of a run: each new value goes to each sink once."""

    def __init__(self, kinds: Sequence[SinkKind], run: SinkRun, history: Mapping[int, Mapping[str, float]]):
        """history: the metrics that the run has recorded already, by step."""
        parts = [(step, _finite(metrics)) for step, metrics in sorted(history.items())]
        self._step, self._sent = parts[-1] if parts else (-1, {})
        self._feeds = [_Feed(kind, run, parts) for kind in kinds]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to a step; values that were sent for it already are left out."""
        if step != self._step:
            self._step, self._sent = step, {}
        new = {name: value for name, value in _finite(metrics).items() if self._sent.get(name) != value}
        self._sent = self._sent | new
        for feed in self._feeds if new else ():
            feed.put((step, new, time.time()))

    def close(self) -> None:
        """Flush what is under way, for a limited time."""
        ends = time.monotonic() + deadlines.SINK_CLOSE_S
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join(max(ends - time.monotonic(), 0.0))


class _Feed:
    """One sink and its thread, which is all that waits for it."""

    def __init__(self, kind: SinkKind, run: SinkRun, history: Sequence[tuple[int, dict[str, float]]]):
        self._kind, self._run, self._history = kind, run, history
        self._parts: queue.Queue[_Part | None] = queue.Queue(_WAITING)
        self._ended = threading.Lock()
        """Taken for good by the first that ends the feed, so that one warning is given."""
        self._thread = threading.Thread(target=self._work, name=f"metrics-{kind.name}", daemon=True)
        self._thread.start()

    def put(self, part: _Part | None) -> None:
        if self._ended.locked():
            return
        try:
            self._parts.put_nowait(part)
        except queue.Full:
            self._give_up(f"it is {_WAITING} parts of steps behind")

    def end(self) -> None:
        self.put(None)

    def join(self, limit_s: float) -> None:
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._give_up(f"it did not end within {deadlines.SINK_CLOSE_S:g} s")

    def _give_up(self, why: str) -> None:
        if self._ended.acquire(blocking=False):
            _LOG.warning(
                "metrics no longer go to %s: %s; the run goes on, run.sqlite has all metrics", self._kind.name, why
            )

    def _work(self) -> None:
        try:
            sink = self._kind.open(self._run)
            last, now = sink.last_step, time.time()
            for step, metrics in self._history:
                if last is not None and step > last:
                    sink.write(step, metrics, now)
            while (part := self._parts.get()) is not None and not self._ended.locked():
                sink.write(*part)
            sink.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a foreign package raises
            self._give_up(f"{type(error).__name__}: {error}".split("\n")[0])


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
