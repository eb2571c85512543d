"""Every benchmark runs on a CPU with `--tiny`, and what it imports of Lockstep exists."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))
WITH_OPTIONS = [path for path in BENCHMARKS if "ArgumentParser(" in path.read_text()]


@pytest.mark.parametrize("path", WITH_OPTIONS, ids=lambda path: path.stem)
def test_it_has_a_tiny_form(path):
    text = path.read_text()
    assert "tiny_option(parser" in text or '"--tiny"' in text


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_what_it_imports_exists(path):
    """Benchmarks are not type-checked, and a moved module would be noticed on the day that somebody measures."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lockstep"):
            spec = importlib.util.find_spec(node.module or "")
            assert spec is not None, node.module
            names = {alias.name for alias in node.names} - {"annotations"}
            source = Path(spec.origin or "").read_text()
            folder = Path(spec.origin or "").parent
            missing = [name for name in names if name not in source and not (folder / f"{name}.py").exists()]
            assert not missing, (node.module, missing)
