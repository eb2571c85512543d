"""The direct path gives the same bytes as vLLM's `load_weights`, for its own model classes of every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lockstep.families.tiny import write_tiny
from lockstep.process import child_env, spawn
from lockstep_vllm.direct import DirectUnavailableError, make_plan

# A mixture first: vLLM makes its expert group for the first model of a process, if that has experts.
FAMILIES = ["qwen3_moe", "qwen3", "qwen3_5", "qwen3_5_moe"]


@pytest.mark.server
def test_the_same_bytes_as_load_weights(runtime, tmp_path):
    folders = [str(write_tiny(f, tmp_path / f"{f}-{seed}", seed=seed)) for f in FAMILIES for seed in (1, 2)]
    env = child_env(
        {
            "PYTHONPATH": str(runtime.plugin_path),
            "VLLM_PLUGINS": "lockstep",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
    )
    probe = Path(__file__).with_name("direct_probe.py")
    child = spawn([str(runtime.python), str(probe), *folders], env, tmp_path / "log", "the probe")
    assert child.wait(400.0) == 0, child.log_tail(30)
    lines = [line for line in child.log_path.read_text().splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(FAMILIES)
    for line in lines:
        result = json.loads(line.removeprefix("RESULT "))
        assert result["copies"] >= result["parameters"] > 20
        assert result["differing"] == []
        # Parameters that start the same under every seed stay; the matrices change.
        assert not [name for name in result["unchanged"] if "proj" in name or "experts" in name or "embed" in name]


def staged_pair():
    bucket_N = torch.zeros(64, dtype=torch.uint8)
    return bucket_N, bucket_N[:32].view(torch.float32), bucket_N[32:].view(torch.float32)


def test_what_cannot_be_repeated_is_refused():
    bucket_N, left, right = staged_pair()
    weight = torch.zeros(2, 8)
    both = {"w": weight, "alias": weight}
    plan = make_plan(both, [bucket_N], lambda: (weight[0].copy_(left), weight[1].copy_(right)))
    left.fill_(3)
    right.fill_(4)
    plan.copy()
    assert weight.tolist() == [[3.0] * 8, [4.0] * 8]
    padded = make_plan({"w": weight}, [bucket_N], lambda: (weight[0].copy_(right), weight[1:].fill_(7)))
    left.fill_(1)
    padded.copy()
    assert weight.tolist() == [[4.0] * 8, [7.0] * 8]
    bad = {
        "computed": lambda: weight.copy_(torch.stack([left, right]) + 1),
        "in place": lambda: (weight[0].copy_(left), weight[1].copy_(right), weight.add_(1)),
        "filled and written": lambda: (weight.zero_(), weight[0].copy_(left), weight[1].copy_(right)),
        "half": lambda: weight[0].copy_(left),
        "twice": lambda: (weight[0].copy_(left), weight[1].copy_(right), weight[0].copy_(right)),
    }
    for load in bad.values():
        with pytest.raises(DirectUnavailableError, match="'w'"):
            make_plan({"w": weight}, [bucket_N], load)
    with pytest.raises(DirectUnavailableError, match="packed away"):
        make_plan({"gone": torch.empty(0)}, [bucket_N], lambda: None)
