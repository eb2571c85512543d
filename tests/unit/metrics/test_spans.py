"""Spans of a run: on disk, for Perfetto, and as OpenTelemetry's."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lockstep.cli.main import app
from lockstep.cli.report.trace import trace_events
from lockstep.errors import ConfigError
from lockstep.metrics.spans import FILE, Span, read_spans, span
from runs import healthy_metrics, make_run


def test_a_block_that_raises_is_a_span_and_a_line_that_was_cut_off_is_none(tmp_path):
    with pytest.raises(ValueError, match="no"), span(tmp_path, "train", 3):
        raise ValueError("no")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"name": "sync", "st')
    (kept,) = read_spans(tmp_path)
    assert (kept.name, kept.step) == ("train", 3)
    assert 0 <= kept.seconds < 60
    assert kept.start > 1.7e9


def test_a_folder_that_takes_no_file_stops_no_step(tmp_path):
    with span(tmp_path / "gone", "train", 1):
        pass


def test_spans_of_a_track_never_overlap():
    """Rollouts of a pipeline overlap each other; Perfetto takes what overlaps within a track for a call inside a call."""
    random = np.random.default_rng()
    spans = [Span("rollout", n, float(random.uniform(0, 50)), float(random.exponential(5))) for n in range(200)]
    events = [event for event in trace_events("demo/run", [*spans, Span("train", 1, 3.0, 4.0)]) if event["ph"] == "X"]
    assert len(events) == 201
    assert len({event["tid"] for event in events if event["cat"] == "train"}) == 1
    for track in {event["tid"] for event in events}:
        row = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["tid"] == track)
        assert all(ends <= begins + 1e-3 for (_, ends), (begins, _) in itertools.pairwise(row))
    assert sum(event["dur"] for event in events) == pytest.approx((sum(s.seconds for s in spans) + 4) * 1e6)


def test_the_command_writes_the_file(tmp_path):
    random = np.random.default_rng()
    run = make_run(tmp_path, "/nowhere", healthy_metrics(2, random), {}, random).path
    assert isinstance(CliRunner().invoke(app, ["trace", str(run)]).exception, ConfigError)
    with span(run, "sync", 2):
        pass
    result = CliRunner().invoke(app, ["trace", str(run)])
    assert result.exit_code == 0, result.output
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events] == ["process_name", "sync 2", "thread_name"]


@pytest.mark.skipif(importlib.util.find_spec("opentelemetry") is None, reason="no opentelemetry-sdk on this machine")
async def test_they_are_spans_of_the_programs_own_provider(tmp_path, monkeypatch):
    """What an agent records while it rolls out lies below the span, also in a task of its own."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)

    async def agent() -> None:
        with provider.get_tracer("agent").start_as_current_span("call"):
            await asyncio.sleep(0)

    (tmp_path / "demo").mkdir()
    with span(tmp_path / "demo", "rollout", 7):
        await asyncio.gather(agent(), agent())
    *calls, rollout = exporter.get_finished_spans()
    assert rollout.name == "lockstep.rollout"
    assert dict(rollout.attributes or {}) == {"lockstep.run": f"{tmp_path.name}/demo", "lockstep.step": 7}
    assert [call.parent and call.parent.span_id for call in calls] == [rollout.context.span_id] * 2
