"""Weights & Biases: the run's project and name are W&B's. A resumed run goes on in the same W&B run.

Host, entity and mode follow W&B's own variables. With WANDB_MODE=offline nothing leaves the
machine; `wandb sync` sends the run's folder `wandb/` later.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping

from lockstep.metrics.names import tag
from lockstep.metrics.sinks.base import SinkKind, SinkRun

_STEP = "step"


class WeightsAndBiases:
    def __init__(self, run: SinkRun):
        wandb = importlib.import_module("wandb")
        known = (run.path / "wandb").exists()  # an earlier start, offline perhaps
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.key,
            resume="allow",
            dir=str(run.path),
            config=dict(run.settings),
            allow_val_change=True,
            reinit="create_new",  # a user's own W&B run in this process stays as it is
            settings=wandb.Settings(console="off"),  # the terminal is the live table's
        )
        self.last_step = None if known or self._run.resumed else -1
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)

    def write(self, step: int, metrics: Mapping[str, float], wall_time: float) -> None:
        self._run.log({_STEP: step, **{tag(name): value for name, value in metrics.items()}})

    def close(self) -> None:
        self._run.finish()


def _problem() -> str | None:
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return None
    if importlib.import_module("wandb").login(prompt=False):
        return None
    return "there is no key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"


SINK = SinkKind("wandb", WeightsAndBiases, "wandb", _problem)
