"""TensorBoard event files below the run's folder: `tensorboard --logdir runs` shows all runs.

The writer is that of the package `tensorboard`, which torch uses, too. Here it needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from lockstep.metrics.names import tag
from lockstep.metrics.sinks.base import SinkKind, SinkRun

FOLDER = "tensorboard"


class TensorBoard:
    def __init__(self, run: SinkRun):
        folder = run.path / FOLDER
        self.last_step = None if folder.exists() else -1
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        writers = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._out = writers.EventFileWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float], wall_time: float) -> None:
        values = [self._summary.Value(tag=tag(name), simple_value=value) for name, value in metrics.items()]
        self._out.add_event(self._event(wall_time=wall_time, step=step, summary=self._summary(value=values)))
        self._out.flush()

    def close(self) -> None:
        self._out.close()


SINK = SinkKind("tensorboard", TensorBoard, "tensorboard")
