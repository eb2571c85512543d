"""bf16 on GPUs: no NaN, and log-probabilities within 1.3 times the noise of Hugging Face in bf16 against itself in fp32."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.testing.programs import torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LIMIT = 1.3


def measured(folder: Path, processes: int) -> dict[str, Any]:
    out = folder / "out.json"
    command = torchrun(processes, str(Path(__file__).parent / "ranks.py"), str(out))
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "4"}, check=True, timeout=1500)
    return json.loads(out.read_text())


@pytest.mark.parametrize("processes", [1, 2])
def test_within_the_noise(tmp_path: Path, processes: int) -> None:
    if processes > torch.cuda.device_count():
        pytest.skip(f"needs {processes} GPUs")
    for name, result in measured(tmp_path, processes).items():
        assert result["unpacked_finite"], name
        assert result["packed_finite"], name
        assert result["unpacked"] <= LIMIT * result["noise"], (name, result)
        assert result["packed"] <= LIMIT * result["noise"], (name, result)
        norms = [step["grad_norm"] for step in result["steps"]]
        assert all(0 < norm < 1e6 for norm in norms), (name, norms)
        assert norms[0] == pytest.approx(result["gradient_norm_fp32"], rel=0.1), (name, result)
        lengths = [(step["compilations"], step["seconds_compile"]) for step in result["steps_of_other_lengths"]]
        assert lengths == [(0, 0)] * len(lengths), (name, "rows of another length compile again")
        assert result["steps"][0]["compilations"] > 0, name
        assert result["after"] > 5 * result["packed"], (name, "three steps left the policy where it was")
