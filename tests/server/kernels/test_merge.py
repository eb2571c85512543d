"""The merge that a GPU does in one kernel is the one that a CPU does. Its rounding to bf16 is `tests/gpu/test_merge_kernel.py`'s."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import lockstep
from helpers import ENGINE
from lockstep.testing.programs import probed


@pytest.mark.server
def test_the_kernel_merges_the_same(runtime, tmp_path):
    seed = random.randrange(10_000)
    paths = [Path(lockstep.__file__).parents[1], runtime.plugin_path / "lockstep_vllm" / "interpreter"]
    env = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    probe = ENGINE / "merge_probe.py"
    [cases] = probed(runtime, probe, str(seed), env=env, log=tmp_path / "log")
    for dtype, units, effect in cases:
        # The interpreter cuts to bf16 and doesn't round.
        assert units <= (1.01 if dtype == "torch.bfloat16" else 4), seed
        assert effect > 0.1, seed
