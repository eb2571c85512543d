"""The project's words: no old word of the dictionary, and no local name that says nothing, comes back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("runtime/src/**/*.py")])
TEXTS = sorted(
    [
        *PROGRAMS,
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("examples/**/*.py"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)

OLD_WORDS = {
    r"expert routes|\w*[Rr]outes_|_[Rr]outes\w*|\bRouteShape|\broutes\b|\broute_": "routed experts",
    r"\bpicks_|_picks\b|\b[Pp]icks\b(?! (its|one|the|kernels))": "expert choices",
    r"\bcrew\b": "sender group",
    r"\b[Tt]ells\b|\b[Tt]old\b|\btold_": "describes, description",
    r"\bdealt\b": "distributed round-robin",
    r"\b[Ww]orst\b|\bworst_": "largest",
    r"\b[Pp]rove[ns]?\b|\b[Pp]roof\b|\b[Uu]nproven\b": "verify, verification",
    r"\bshared mode\b|\bgpu_shared\b": "colocated mode",
    r"\b[Mm]icrobatch(es)?\b(?!\.py| import)": "micro-batch",
}
"""A pattern of what we used to say, and the word in its place."""

KEPT = {
    "routes": {
        "src/lockstep/cli/score.py": "an input file of an earlier version",
        "src/lockstep/metrics/names.py": "metrics that runs of earlier versions recorded",
        "src/lockstep/backends/tinker/chat_server.py": "starlette's argument",
        "src/lockstep/gateway/app.py": "starlette's argument",
        "src/lockstep/cli/report/live.py": "starlette's argument",
        "runtime/src/lockstep_wire/routed_experts.py": "digests in trajectories of earlier versions",
    },
    "proven": {
        "src/lockstep/validate/figures.py": "the status of a stage that was not run",
        "docs/how-to/add-a-model.md": "the status of a stage that was not run",
    },
    "picks": {"src/lockstep/metrics/names.py": "a metric that runs of earlier versions recorded"},
}
"""Old words that a file format or another library keeps, and why."""

NAMED = sorted(
    [*PROGRAMS, *(path for folder in ("tests", "benchmarks", "examples") for path in ROOT.glob(f"{folder}/**/*.py"))]
)
"""Programs whose names are looked at."""

EMPTY_NAMES = {"found", "one", "held", "mine", "told", "everyones", "whole", "at"}
"""Names of locals, parameters and functions that don't say what the thing is."""


@pytest.mark.parametrize("pattern", OLD_WORDS)
def test_no_old_word_comes_back(pattern):
    hits = []
    for path in TEXTS:
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for match in re.finditer(pattern, line):
                if not any(word in match[0] and name in files for word, files in KEPT.items()):
                    hits.append(f"{name}:{number}: {match[0]!r} in {line.strip()[:80]!r}")
    assert not hits, f"say {OLD_WORDS[pattern]}:\n" + "\n".join(hits)


def empty_names(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                pass
            case ast.AsyncFunctionDef(name=name) | ast.alias(asname=str(name)):
                pass
            case _:
                continue
        if name in EMPTY_NAMES:
            yield node.lineno, name


def test_a_name_says_what_the_thing_is():
    hits = [f"{p.relative_to(ROOT)}:{line}: {name}" for p in NAMED for line, name in empty_names(p.read_text())]
    assert not hits, "name the thing:\n" + "\n".join(hits)


def test_the_guard_sees_every_kind_of_name():
    source = "def whole(at): pass\nasync def held(): pass\nimport os as told\nfor one in x: mine = found\n"
    source += "y = [everyones for everyones in x]\n"
    assert {name for _, name in empty_names(source)} == EMPTY_NAMES - {"found"}
