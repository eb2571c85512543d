"""report.html: one file that asks for nothing, whatever the names in it look like."""

from __future__ import annotations

import re
from pathlib import Path

from lockstep.validate.figures import count, figure, judged
from lockstep.validate.page.page import render, write_page
from lockstep.validate.registry import stage_names
from lockstep.validate.request import Request
from lockstep.validate.source import Source
from lockstep.validate.summary import report_of

MARKUP = "<script>alert(1)</script>"


def report() -> dict:
    plots = {
        "parity per module": {"embedding": 0.0, MARKUP: 1e-4, "layers.0": float("inf")},
        "logprob scatter": {"base": [[-1.0, -1.1]], "adapter": [[-2.0, -2.0]]},
        "reward": {"greedy": [0.5, 0.9], "sampled": [0.4]},
    }
    outcome = judged([figure("gradients", [1e-5, 3e-5], ["a", MARKUP], 2e-5), count("x", 0)], [MARKUP], plots)
    source = Source(MARKUP, "tiny", Path("x"), "qwen3", "4 of 4")
    return report_of(source, Request(Path("x"), Path("y"), "qwen3"), {"hf_parity": outcome}, ["hf_parity"], MARKUP)


def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    page = write_page(report(), tmp_path).read_text()
    assert MARKUP not in page
    assert not re.search(r"(src|href)=[\"']?(https?:|//)|@import|<script|<link", page)
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page
    assert page.count("<svg") == 3
    for name in stage_names():
        assert f"id='{name}'" in page
    assert "3e-05" in page
    assert "not proven" in page


def test_a_report_without_plots_is_a_page() -> None:
    plain = report()
    for entry in plain["stages"]:
        entry["plots"] = {}
    assert "<svg" not in render(plain)
