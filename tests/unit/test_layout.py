"""The sizes that keep the code readable: boxes at the top, modules of a folder, lines of a file and of a function."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOXES_AT_THE_TOP = 20
MODULES_OF_A_FOLDER = 15
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60

PROGRAMS = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("runtime/**/*.py")])


def crowded_folders(paths: list[Path]) -> Iterator[str]:
    """Folders that hold too many modules. `__init__.py` counts."""
    for folder, modules in sorted(Counter(path.parent for path in paths).items()):
        if modules > MODULES_OF_A_FOLDER:
            yield f"{folder}: {modules} modules"


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Names and lines of the functions that are too long; decorators don't count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > LINES_OF_A_FUNCTION:
                yield node.name, lines


def test_the_top_level_shows_the_architecture():
    """A box is a folder or a module beside `__init__.py`."""
    boxes = {path.relative_to(ROOT / "src/lockstep").parts[0] for path in ROOT.glob("src/lockstep/**/*.py")}
    assert len(boxes - {"__init__.py"}) <= BOXES_AT_THE_TOP, f"group by noun: {sorted(boxes)}"


def test_a_folder_is_read_at_a_glance():
    crowded = list(crowded_folders([path.relative_to(ROOT) for path in PROGRAMS]))
    assert not crowded, f"at most {MODULES_OF_A_FOLDER}, group by noun:\n" + "\n".join(crowded)


def test_a_file_has_one_noun():
    sizes = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in PROGRAMS}
    long = [f"{path}: {lines} lines" for path, lines in sizes.items() if lines > LINES_OF_A_FILE]
    assert not long, f"at most {LINES_OF_A_FILE}, move a noun out:\n" + "\n".join(long)


def test_a_function_fits_on_a_screen():
    long = [
        f"{path.relative_to(ROOT)}: {name} has {lines} lines"
        for path in PROGRAMS
        for name, lines in long_functions(path.read_text(encoding="utf-8"))
    ]
    assert not long, f"at most {LINES_OF_A_FUNCTION}:\n" + "\n".join(long)


@pytest.mark.parametrize(("lines", "names"), [(LINES_OF_A_FUNCTION, []), (LINES_OF_A_FUNCTION + 1, ["f"])])
def test_the_guard_counts_from_the_first_line_to_the_last(lines, names):
    source = "class C:\n    @staticmethod\n    async def f():\n" + "        pass\n" * (lines - 1)
    assert [name for name, _ in long_functions(source)] == names


def test_the_guard_sees_a_crowded_folder():
    modules = [Path(f"a/{number}.py") for number in range(MODULES_OF_A_FOLDER)]
    assert not list(crowded_folders([*modules, Path("a/b/c.py")]))
    assert list(crowded_folders([*modules, Path("a/c.py")])) == ["a: 16 modules"]
