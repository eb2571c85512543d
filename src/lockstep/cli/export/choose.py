"""The step that an export is about: a number, the last one, or the best one."""

from __future__ import annotations

import math
from pathlib import Path

from lockstep.errors import ConfigError, StoreError
from lockstep.runs.database import read_metrics, read_settings
from lockstep.runs.store import published_steps

BEST = "best"
_METRIC = "greedy_reward"


def chosen_step(run: Path, step: str | None) -> int | None:
    """None: the last one.

    Raises ConfigError for a text that is neither a number nor "best", StoreError where no published
    step has the metric that the run calls best (`keep_best` in [backend]).
    """
    if step is None:
        return None
    if step.isdecimal():
        return int(step)
    if step != BEST:
        raise ConfigError(f"--step {step}: give a number or {BEST}")
    metric = read_settings(run).get("keep_best") or _METRIC
    metrics = read_metrics(run)
    values = {number: metrics.get(number, {}).get(metric) for number in published_steps(run)}
    known = {number: value for number, value in values.items() if value is not None and math.isfinite(value)}
    if not known:
        raise StoreError(f"no published step of {run} has the metric {metric}: give --step a number")
    return max(known, key=lambda number: (known[number], number))
