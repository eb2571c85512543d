"""The merge that a GPU does in one kernel is the one that a CPU does. Its rounding to bf16 is `tests/gpu/test_merge_kernel.py`'s."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

import lockstep
from lockstep.process import child_env, spawn


@pytest.mark.server
def test_the_kernel_merges_the_same(runtime, tmp_path):
    seed = random.randrange(10_000)
    paths = [Path(lockstep.__file__).parents[1], runtime.plugin_path / "lockstep_vllm" / "interpreter"]
    env = child_env({"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    probe = Path(__file__).with_name("merge_probe.py")
    child = spawn([str(runtime.python), str(probe), str(seed)], env, tmp_path / "log", "the probe")
    assert child.wait(200.0) == 0, child.log_tail(30)
    line = next(line for line in child.log_path.read_text().splitlines() if line.startswith("RESULT "))
    for dtype, units, effect in json.loads(line.removeprefix("RESULT ")):
        assert units <= (1.01 if dtype == "torch.bfloat16" else 4), (
            seed
        )  # the interpreter cuts to bf16 and doesn't round
        assert effect > 0.1, seed
