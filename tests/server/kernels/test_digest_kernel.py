"""The digest a GPU computes in one kernel is the one that a CPU computes."""

from __future__ import annotations

import os

import pytest

from helpers import SERVER
from lockstep.testing.programs import probed


@pytest.mark.server
def test_the_kernel_gives_the_same_digits(runtime, tmp_path):
    paths = [runtime.plugin_path, runtime.plugin_path / "lockstep_vllm" / "interpreter"]
    env = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    [pairs] = probed(runtime, SERVER / "digest_probe.py", env=env, log=tmp_path / "log")
    assert len({kernel for kernel, _ in pairs}) == 4
    assert all(kernel == plain for kernel, plain in pairs)
