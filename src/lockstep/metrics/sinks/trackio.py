"""trackio: a local dashboard (`trackio show`), or a Hugging Face Space if TRACKIO_SPACE_ID names
one. A resumed run goes on in the same trackio run.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from lockstep.metrics.names import tag
from lockstep.metrics.sinks.base import SinkKind, SinkRun


class Trackio:
    last_step: int | None = None

    def __init__(self, run: SinkRun):
        # trackio knows a run by its name alone, so a run that starts anew needs another one.
        self._run = importlib.import_module("trackio").init(
            project=run.project,
            name=f"{run.name}-{run.key[:6]}",
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, metrics: Mapping[str, float], wall_time: float) -> None:
        self._run.log({tag(name): value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


SINK = SinkKind("trackio", Trackio, "trackio")
