"""The table of changes to vLLM's code: complete, and each with the test that says when it can go."""

from __future__ import annotations

import ast
from pathlib import Path

from lockstep_vllm import patches

ROOT = Path(__file__).parents[3]
PLUGIN = ROOT / "runtime" / "src" / "lockstep_vllm"


def modules_that_patch() -> set[str]:
    """Modules of the plugin with a function `apply()` at their top."""
    modules = set()
    for path in PLUGIN.rglob("*.py"):
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        if "apply" in names and path.parent / "__init__.py" != path:
            modules.add(".".join(path.relative_to(PLUGIN).with_suffix("").parts))
    return modules


def test_every_patch_is_in_the_table():
    assert {patch.module for patch in patches.PATCHES} == modules_that_patch()
    assert all(patch.why for patch in patches.PATCHES)


def test_the_tests_that_say_when_a_patch_can_go_exist():
    named = [patch.gone_when for patch in patches.PATCHES if patch.gone_when]
    assert named
    assert all((ROOT / name).is_file() for name in named)
