"""Modules of the server's plugin that need no vLLM, for tests that put both sides of a sync together in one process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def plugin_module(name: str) -> ModuleType:
    """`lockstep_vllm.NAME` from its file."""
    known = sys.modules.get(f"receivers_{name}")
    if known is not None:
        return known
    path = Path(__file__).resolve().parents[1] / "runtime" / "src" / "lockstep_vllm" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"receivers_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
