"""MLflow: the project is an experiment, the run is a run of it. A resumed run goes on in the same
MLflow run. The tracking server is MLFLOW_TRACKING_URI's.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping

from lockstep.metrics.names import tag
from lockstep.metrics.sinks.base import SinkKind, SinkRun

_KEY = "lockstep.run"
_REFUSED = re.compile(r"[^\w\-. :/]", re.ASCII)
"""Characters that MLflow does not take in a name."""


class MLflow:
    def __init__(self, run: SinkRun):
        self._mlflow = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        known = self._client.search_runs([number], f"tags.`{_KEY}` = '{run.key}'")
        self.last_step = None if known else -1
        if known:
            self._id = known[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
        else:
            self._id = self._client.create_run(number, tags={_KEY: run.key}, run_name=run.name).info.run_id
            for name, value in run.settings.items():
                self._client.log_param(self._id, name, value)

    def write(self, step: int, metrics: Mapping[str, float], wall_time: float) -> None:
        row = [
            self._mlflow.entities.Metric(_REFUSED.sub("_", tag(name)), value, int(1000 * wall_time), step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self._id, metrics=row)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _problem() -> str | None:
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    return "there is no tracking server: set MLFLOW_TRACKING_URI, such as http://127.0.0.1:5000"


SINK = SinkKind("mlflow", MLflow, "mlflow", _problem)
