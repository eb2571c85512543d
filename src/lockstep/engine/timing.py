"""Seconds per phase of a step, and how often torch compiled in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lockstep.engine.layers.compiled_ops import Compiled, compile_clock
from lockstep.engine.parallel.device import CUDA

Report = Callable[[dict[str, Any]], None]


@dataclass
class Clock:
    """Seconds per phase, and where the work is now."""

    report: Report
    seconds: dict[str, float] = field(default_factory=dict)
    compiled: Compiled = field(default_factory=lambda: compile_clock().compiled)
    """The compilations of torch before the clock started."""

    @contextmanager
    def phase(self, name: str):
        self.report({"kind": "phase", "phase": name})
        start = time.perf_counter()
        yield
        if CUDA:
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds of each phase; how often torch compiled since the start, and the seconds that
        took.
        """
        compiled = compile_clock().compiled
        return {f"seconds_{name}": value for name, value in self.seconds.items()} | {
            "compilations": float(compiled.count - self.compiled.count),
            "seconds_compile": compiled.seconds - self.compiled.seconds,
        }
