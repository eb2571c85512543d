"""The reference pages and tables are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.cli.reference import PAGES
from lockstep.metrics.names import METRICS, SECTIONS

DOCS = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_is_what_the_code_says(name):
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "run `make reference`"


def test_every_metric_has_a_section_a_unit_and_a_meaning():
    assert {metric.section for metric in METRICS.values()} == set(SECTIONS)
    assert all(metric.unit and metric.says.endswith(".") for metric in METRICS.values())
