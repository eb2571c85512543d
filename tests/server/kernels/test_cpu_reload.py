"""vLLM's reload on CPU against Hugging Face: wrong without our fixes, right with them.

When the first half fails, vLLM has repaired the fault and the fix can go.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import SERVER
from lockstep.models.tiny.write import write_tiny
from lockstep.testing.programs import probed

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])  # a tied head; packed experts
def test_a_reload_is_wrong_without_the_fix_and_right_with_it(runtime, tmp_path, family):
    old = write_tiny(family, tmp_path / "old", seed=1)
    new = write_tiny(family, tmp_path / "new", seed=2)
    tokens = torch.randint(3, 320, (30,), generator=torch.Generator().manual_seed(4)).tolist()
    env = {
        "PYTHONPATH": f"{runtime.plugin_path}:{SERVER}",
        "VLLM_PLUGINS": "lockstep",
        "LOCKSTEP_WITHOUT_CPU_RELOAD_FIXES": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = (str(old), str(new), json.dumps(tokens))
    probe = SERVER / "reload_probe.py"
    [values] = probed(runtime, probe, *arguments, env=env, log=tmp_path / "log", seconds=300.0)
    scores = {name: torch.tensor(value) for name, value in values.items()}
    torch.testing.assert_close(scores["before"], hf_logprobs(old, tokens), atol=1e-5, rtol=0)
    reference_S = hf_logprobs(new, tokens)
    assert (scores["without"] - reference_S).abs().max() > 1e-3
    torch.testing.assert_close(scores["with"], reference_S, atol=1e-5, rtol=0)


def hf_logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probability of each token after the first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_SV = model(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits_SV[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
