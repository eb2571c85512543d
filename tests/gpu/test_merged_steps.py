"""Two real steps from GPU 0 into a server on GPU 1 with requests in flight: merged weights and adapters (`benchmarks/merged_steps.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, one for each side"),
]

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "merged_steps.py"


@pytest.mark.parametrize("mode", ["merged", "lora"])
def test_the_alias_moves_and_requests_in_flight_end(tmp_path: Path, mode: str) -> None:
    out = tmp_path / "steps.json"
    command = [sys.executable, str(PROGRAM), "--mode", mode, "--shape", "qwen3-30b-a3b", "--layers", "2"]
    command += ["--server-arg=--enforce-eager", "--logs", str(tmp_path / "logs"), "--output", str(out)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["faults"] == []
    assert [step["alias"] for step in report["steps"]] == ["@0 -> @1", "@1 -> @2"]
    assert all(step["through"] > 0 for step in report["steps"])
