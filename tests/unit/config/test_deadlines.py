"""Every deadline is in one table (audit, section 3)."""

from __future__ import annotations

import ast
from pathlib import Path

import lockstep

SOURCE = Path(lockstep.__file__).parent
WAITS = ("timeout", "timeout_s", "deadline_s", "start_deadline_s")
OWN = {"trainer/protocol.py"}
"""`EngineConfig.timeout_s` is a field of a file that a user may write."""


def numbers_in_waits(path: Path) -> list[str]:
    """Where a wait has a number of its own: as an argument or as a default; a pause below a second is none."""
    tree, lines = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Call):
            pairs = [(word.arg, word.value) for word in node.keywords]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = [*node.args.posonlyargs, *node.args.args]
            defaults = node.args.defaults
            pairs = [(arg.arg, value) for arg, value in zip(named[len(named) - len(defaults) :], defaults, strict=True)]
            pairs += [(arg.arg, value) for arg, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
        for name, value in pairs:
            number = value.value if isinstance(value, ast.Constant) else None
            if name in WAITS and isinstance(number, int | float) and number > 1:
                lines.append(f"{path.relative_to(SOURCE)}:{value.lineno} {name}={number}")
    return lines


def test_every_deadline_is_in_the_table():
    files = [path for path in SOURCE.rglob("*.py") if str(path.relative_to(SOURCE)) not in OWN]
    assert len(files) > 200
    assert [lines for path in files for lines in numbers_in_waits(path)] == []


def test_a_deadline_elsewhere_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("test_deadlines.SOURCE", tmp_path)
    (tmp_path / "new.py").write_text("def wait(deadline_s: float = 30.0):\n    connect(timeout=5)\n")
    assert numbers_in_waits(tmp_path / "new.py") == ["new.py:1 deadline_s=30.0", "new.py:2 timeout=5"]
