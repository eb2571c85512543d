"""The digest a GPU computes in one kernel is the one that a CPU computes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lockstep.process import child_env, spawn


@pytest.mark.server
def test_the_kernel_gives_the_same_digits(runtime, tmp_path):
    paths = [runtime.plugin_path, runtime.plugin_path / "lockstep_vllm" / "interpreter"]
    env = child_env({"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    probe = Path(__file__).with_name("digest_probe.py")
    child = spawn([str(runtime.python), str(probe)], env, tmp_path / "log", "the probe")
    assert child.wait(200.0) == 0, child.log_tail(30)
    line = next(line for line in child.log_path.read_text().splitlines() if line.startswith("RESULT "))
    pairs = json.loads(line.removeprefix("RESULT "))
    assert len({kernel for kernel, _ in pairs}) == 4
    assert all(kernel == plain for kernel, plain in pairs)
