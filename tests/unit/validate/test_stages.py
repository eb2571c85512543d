"""Stages in their own processes: a family from the command line, a deadline, and a stage that dies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lockstep.models.tiny.write import write_tiny
from lockstep.validate.command import Options, validate
from lockstep.validate.figures import FAILED, NOT_APPLICABLE, PASSED
from lockstep.validate.registry import stage_named
from lockstep.validate.request import Request
from lockstep.validate.runner import Hooks, run_one, run_stages

SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "dtype": "float32"}


SHORT = ["architecture_discovery", "tokenizer_and_template", "hf_parity"]
"""Stages without a server that cost seconds on a small model: the command as a user runs it."""


def test_a_hybrid_mixture_passes_the_short_form_and_its_report_is_written(tmp_path: Path) -> None:
    small = {**SMALL, "full_attention_interval": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    folder = write_tiny("qwen3_5_moe", tmp_path / "model", seed=1, overrides=small)
    options = Options(SHORT, device="cpu", layers="minimal", report=tmp_path / "out", jobs=2)
    assert validate(str(folder), options, Console(quiet=True)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["passed"], report["complete"], report["layers"]) == (True, False, "2 of 3")
    assert report["versions"]["torch"]
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert [name for name, stage in stages.items() if stage["status"] == PASSED] == SHORT
    gradients = next(figure for figure in stages["hf_parity"]["figures"] if figure["name"] == "gradients")
    assert 0 < gradients["mean"] < gradients["largest"] <= gradients["limit"]


def test_a_stage_that_dies_or_hangs_fails_and_the_others_go_on(tmp_path: Path) -> None:
    folder = write_tiny("qwen3", tmp_path / "model", overrides=SMALL)
    (folder / "model.safetensors").write_bytes(b"nothing")
    request = Request(folder, tmp_path / "stages", "qwen3")
    stages = [stage_named("weight_round_trip"), replace(stage_named("architecture_discovery"), moe_only=True)]
    said: list[str] = []
    hooks = Hooks(said.append, said.append, lambda *_: None)
    outcomes = run_stages(stages, request, moe=False, hooks=hooks, jobs=2)
    assert outcomes["weight_round_trip"].status == FAILED
    assert "model.safetensors is no complete safetensors file" in outcomes["weight_round_trip"].reason
    assert outcomes["architecture_discovery"].status == NOT_APPLICABLE
    hasty = replace(
        stage_named("architecture_discovery"), deadline_s=0.0
    )  # over at the first look, while Python still starts
    outcome = run_one(hasty, replace(request, folder=tmp_path / "hasty"), said.append)
    assert outcome.status == FAILED
    assert "still running after 0 s" in outcome.reason
