"""Figures against limits, and what a report says of stages that did not run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from lockstep.errors import ConfigError
from lockstep.validate.command import parse_parallel
from lockstep.validate.figures import FAILED, NOT_APPLICABLE, NOT_PROVEN, PASSED, Outcome, count, figure, judged
from lockstep.validate.figures import outcome_from_json as read
from lockstep.validate.registry import STAGES, selected, stage_names
from lockstep.validate.request import Request, request_from_json
from lockstep.validate.source import Source
from lockstep.validate.summary import report_of, table, verdict
from lockstep.validate.tolerances import TOLERANCES, limit_of


def test_the_largest_value_is_named_and_decides() -> None:
    measured = figure("gradients", [1e-6, 3e-5, 2e-6], ["a", "b", "c"], 2e-5)
    assert (measured.where, measured.largest, measured.ok) == ("b", 3e-5, False)
    assert math.isclose(measured.mean, 33e-6 / 3)
    assert figure("gradients", [1e-6], ["a"], 2e-5).ok
    assert not figure("gradients", [1e-6, math.nan], ["a", "b"], 2e-5).ok
    assert figure("gradients", [1e-6, math.nan], ["a", "b"], 2e-5).where == "b"


def test_nothing_measured_is_no_success() -> None:
    assert not figure("gradients", [], limit=1.0).ok
    assert judged([]).status == FAILED
    outcome = judged([count("tensors that differ", 1, where="lm_head.weight")])
    assert outcome.status == FAILED
    assert "lm_head.weight" in outcome.reason
    assert read(json.loads(json.dumps(outcome.as_json()))) == outcome


def made(outcomes: dict[str, Outcome], chosen: list[str]) -> dict:
    source = Source("qwen3", "tiny", Path("x"), "qwen3", "4 of 4")
    return report_of(source, Request(Path("x"), Path("y"), "qwen3"), outcomes, chosen, "lockstep validate qwen3")


def test_a_partial_report_never_says_complete() -> None:
    passed = Outcome((count("tensors that differ", 0),))
    names = list(stage_names())
    report = made({names[0]: passed}, names[:1])
    assert report["passed"]
    assert not report["complete"]
    assert {entry["status"] for entry in report["stages"][1:]} == {NOT_PROVEN}
    assert "partial" in verdict(report)
    console = Console(width=80, record=True)
    console.print(table(report))
    assert NOT_PROVEN in console.export_text()
    everything = made(dict.fromkeys(names, passed) | {names[-1]: Outcome(status=NOT_APPLICABLE)}, names)
    assert everything["passed"]
    assert everything["complete"]
    cut_short = made({names[0]: passed}, names[:2])
    assert not cut_short["passed"], "a selected stage that did not run"
    failed = made(dict.fromkeys(names, passed) | {names[2]: judged([count("x", 1)])}, names)
    assert not failed["passed"]
    assert names[2] in verdict(failed)


def test_names_of_stages() -> None:
    assert [stage.name for stage in selected([], ["hf_parity"])] == [n for n in stage_names() if n != "hf_parity"]
    assert [stage.name for stage in selected(["hf_parity"], [])] == ["hf_parity"]
    with pytest.raises(ConfigError, match="did you mean train_inf_mismatch"):
        selected(["train_inf_mismatc"], [])
    with pytest.raises(ConfigError, match="no stage is left"):
        selected(["hf_parity"], ["hf_parity"])
    assert len(set(stage_names())) == len(STAGES)


def test_sizes_and_requests_survive_the_way_to_a_process() -> None:
    assert parse_parallel("tp=2, ep=2") == {"tensor": 2, "expert": 2}
    for wrong in ("tp", "tp=0", "nose=2", "tp=a"):
        with pytest.raises(ConfigError, match="--parallel"):
            parse_parallel(wrong)
    request = Request(Path("/m"), Path("/f"), "qwen3", "cpu", 3, None, {"tensor": 2}, run=Path("/r"))
    assert request_from_json(json.loads(json.dumps(request.as_json())), request.say) == request


def test_every_tolerance_has_a_reason_and_none_is_hidden() -> None:
    assert all(len(row.reason) > 10 for row in TOLERANCES)
    keys = [(row.figure, row.precision, row.device) for row in TOLERANCES]
    assert len(set(keys)) == len(keys)
    bounds = {"qwen3": 4.0, "qwen3_5": 4.0, "qwen3_moe": 7.0, "qwen3_5_moe": 5.0}
    for family, percent in bounds.items():
        assert limit_of(f"mismatch percent of {family}", "bfloat16") <= percent
    assert limit_of("mismatch percent of a new family", "bfloat16") == min(bounds.values())
    assert limit_of("mismatch KL", "bfloat16") <= 0.002
    with pytest.raises(ConfigError, match="no limit for"):
        limit_of("nose")
    assert PASSED != FAILED
