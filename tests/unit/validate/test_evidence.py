"""Evidence: what is kept of a report, and when it backs what the registry says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.models.registry import get_model_support_spec_by_key, list_model_support_specs
from lockstep.validate import evidence
from lockstep.validate.figures import Outcome, count, judged
from lockstep.validate.registry import stage_names
from lockstep.validate.request import Request
from lockstep.validate.source import Source
from lockstep.validate.summary import report_of

PASSED = Outcome((count("tensors that differ", 0),))


def report(outcomes: dict[str, Outcome]) -> dict:
    source = Source("qwen3", "tiny", Path("x"), "qwen3", "4 of 4")
    return report_of(
        source, Request(Path("x"), Path("y"), "qwen3"), outcomes, list(outcomes), "lockstep validate qwen3"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "evidence_folder", lambda: tmp_path)
    return tmp_path


def test_a_record_replaces_the_one_before_and_keeps_limited_figures(folder: Path) -> None:
    evidence.add_record(report({"hf_parity": PASSED}), folder)
    evidence.add_record(report(dict.fromkeys(stage_names(), PASSED)), folder)
    (record,) = evidence.read_evidence("qwen3")
    assert record["complete"]
    assert record["stages"]["hf_parity"]["figures"] == {"tensors that differ": [0.0, 0.0]}
    total = len(stage_names())
    assert evidence.summary_of("qwen3") == f"qwen3 on cpu, {total} of {total} stages, {record['date']}"


def test_parts_of_a_validation_make_one_record(folder: Path) -> None:
    names = stage_names()
    evidence.add_record(report(dict.fromkeys(names[:5], PASSED)), folder)
    evidence.add_record(report(dict.fromkeys(names[5:], PASSED)), folder)
    (record,) = evidence.read_evidence("qwen3")
    assert record["complete"]
    kept = json.loads((folder / "qwen3.json").read_text())
    kept["records"][0]["sources"] = "of yesterday"
    (folder / "qwen3.json").write_text(json.dumps(kept))
    evidence.add_record(report({names[0]: PASSED}), folder)
    (record,) = evidence.read_evidence("qwen3")
    assert not record["complete"]
    assert evidence.passed_stages([record]) == {names[0]}


def test_a_claim_needs_a_record_of_todays_sources(folder: Path) -> None:
    spec = get_model_support_spec_by_key("qwen3")
    assert "has no evidence" in next(evidence.unbacked(spec))
    evidence.add_record(report({"hf_parity": PASSED}), folder)
    assert "claims adapters in vLLM" in next(evidence.unbacked(spec))
    evidence.add_record(report(dict.fromkeys(stage_names(), PASSED)), folder)
    assert not list(evidence.unbacked(spec))
    evidence.add_record(report({"hf_parity": judged([count("x", 1)])}), folder)
    assert "hf_parity failed" in next(evidence.unbacked(spec))
    file = folder / "qwen3.json"
    kept = json.loads(file.read_text())
    kept["records"][0]["sources"] = "of yesterday"
    file.write_text(json.dumps(kept))
    assert "older than its sources" in next(evidence.unbacked(spec))
    assert "older than its sources" in evidence.summary_of("qwen3")


def test_words_and_imports_make_nothing_stale() -> None:
    code = evidence._code('"""Says."""\nimport a\ndef f(x):\n    """Says."""\n    return x + 1  # why\n')
    assert code == evidence._code("from b import a\ndef f(x):\n    return x + 1\n")
    assert code != evidence._code("def f(x):\n    return x + 2\n")


def test_kept_evidence_backs_its_entries() -> None:
    """Fails when an entry claims what its evidence does not hold, or the code changed since: validate again."""
    backed = [spec for spec in list_model_support_specs() if evidence.read_evidence(spec.key)]
    assert backed
    assert not [line for spec in backed for line in evidence.unbacked(spec)]
