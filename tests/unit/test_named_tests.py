"""The documents name tests as their evidence: each of them exists, and each line of a table has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("docs/silent-failures.md", "docs/security.md")


def defined_tests() -> set[str]:
    texts = (path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    return {name for text in texts for name in re.findall(r"^\s*(?:async )?def (test_\w+)\(", text, re.MULTILINE)}


def unproven_rows(text: str) -> list[str]:
    """Rows of tables whose last column names no test."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    inner = [row for row in rows if not row.startswith(("|---", "| failure", "| threat"))]
    assert inner
    return [row for row in inner if not re.search(r"`test_\w+`", row.rstrip("|").rpartition("|")[2])]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_named_test_exists(name):
    text = (ROOT / name).read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 15
    assert sorted(named - defined_tests()) == []
    assert unproven_rows(text) == []


def test_a_row_without_a_test_is_found():
    assert unproven_rows("| failure | test |\n|---|---|\n| a | `test_b` |\n| c | later |\n") == ["| c | later |"]
