"""What may import what, checked in bare interpreters: the boundaries of docs/architecture.md."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = {"torch", "transformers", "megatron", "vllm", "ray", "peft", "accelerate", "jinja2", "einops"}
LIGHT = ("registry", "discovery", "contract", "spec", "config", "targets", "layout_rules")
SLOW = {"openai", "pydantic", "pyarrow", "rich", "typer", "httpx", "numpy", "safetensors"}

PROGRAM = """
import importlib, json, os, sys
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
changed = sorted(k for k in {*before, *os.environ} if before.get(k) != os.environ.get(k))
tops = sorted({m.split(".")[0] for m in sys.modules})
print(json.dumps({"modules": tops, "all": sorted(sys.modules), "changed": changed}))
"""


def imported(*names: str) -> dict[str, list[str]]:
    """What a bare interpreter has loaded after importing `names`."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def modules(pattern: str) -> list[str]:
    """Module names of the files under src/lockstep that match."""
    names = [
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((SOURCE / "lockstep").glob(pattern))
        if path.stem != "__main__"
    ]
    assert names, f"nothing matches {pattern}"
    return names


def test_import_lockstep_loads_nothing_and_changes_nothing():
    state = imported("lockstep")
    assert not set(state["modules"]) & (HEAVY | SLOW)
    assert [name for name in state["all"] if name.startswith("lockstep")] == ["lockstep"]
    assert state["changed"] == []


@pytest.mark.parametrize(
    "pattern",
    [
        *("config/*.py", "rollouts/*.py", "model.py", "runs/*.py"),
        *("loop/*.py", "cli/main.py", "process/*.py"),
        *("batching/*.py", "backends/**/*.py", "inference/**/*.py", "trainer/*.py"),
    ],
)
def test_the_users_side_never_loads_a_framework(pattern):
    state = imported(*modules(pattern))
    assert not set(state["modules"]) & HEAVY
    inner = {name for name in state["all"] if name.startswith("lockstep.engine.")}
    assert not inner
    assert state["changed"] == []


def test_tokens_need_only_numpy():
    assert not set(imported(*modules("batching/*.py"))["modules"]) & (HEAVY | SLOW - {"numpy"})


@pytest.mark.parametrize("pattern", [*(f"models/{name}.py" for name in LIGHT), "models/*/spec.py"])
def test_facts_about_families_load_nothing_heavy(pattern):
    assert not set(imported(*modules(pattern))["modules"]) & (HEAVY | {"openai", "pydantic", "httpx"})


def test_configs_do_not_load_openai():
    assert not set(imported("lockstep.config.base", "lockstep.rollouts.trajectory", "lockstep.model")["modules"]) & {
        "openai",
        "pyarrow",
    }


def test_public_names_resolve_and_are_complete():
    program = (
        "import lockstep as ls\n"
        "for name in ls.__all__:\n"
        "    assert getattr(ls, name).__module__.startswith('lockstep.'), name\n"
        "assert set(ls.__all__) <= set(dir(ls))\n"
        "assert set(ls._HOME) == set(ls.__all__)\n"
        "try:\n    ls.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise SystemExit('an unknown name resolved')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_wire_package_imports_neither_side():
    wire = SOURCE.parent / "runtime" / "src" / "lockstep_wire"
    named = {
        (path.name, name)
        for path in wire.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.split(".")[0] in ("lockstep", "lockstep_vllm", "vllm")
    }
    assert not named
