"""Adapters on a CPU: one product per adapter gives what a product per token gives, and nothing to tokens without one.

A token's bits don't depend on the other rows (`h1_alone`).

vLLM's own gives those the last slot's adapter. When that half fails, vLLM has repaired the fault.
"""

from __future__ import annotations

import random

import pytest

from helpers import SERVER
from lockstep.testing.programs import probed


@pytest.mark.server
def test_each_token_gets_its_own_adapter_or_none(runtime, tmp_path):
    shape = [random.randint(9, 40) for _ in range(3)] + [random.choice([1, 8]), random.randint(2, 4)]
    env = {"PYTHONPATH": str(runtime.plugin_path), "VLLM_PLUGINS": ""}
    arguments = [*map(str, shape), str(random.randrange(1 << 20))]
    [errors] = probed(runtime, SERVER / "lora_probe.py", *arguments, env=env, log=tmp_path / "log")
    assert errors.pop("without_on_base") > 1e-2, arguments
    assert all(difference < 1e-4 for difference in errors.values()), (arguments, errors)
