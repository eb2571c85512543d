"""A real model through all of it: real weights and real text have an opinion about every token, random ones don't.

The reference is Hugging Face's model in fp64: its own fp32 log-probabilities are off by 7e-6 nats on average, since torch sums
49,152 exponentials in fp32.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversations import CONVERSATIONS
from lockstep.cli.score import Line, score


@pytest.fixture(scope="module")
def reference(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64).eval()


def logprobs_of(model, ids):
    """[S-1] log-probability of each token after the first."""
    with torch.no_grad():
        logits_SV = model(torch.tensor([ids])).logits[0]
    return logits_SV[:-1].double().log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


async def test_scores_of_real_conversations_are_hugging_faces(smollm2, reference):
    """fp32: within 1e-5 nats per token on average in each of 20 conversations, packed into prefix trees."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lines = [
        Line(id=str(number), tokens=tokenizer.apply_chat_template(messages, return_dict=False))
        for number, messages in enumerate(CONVERSATIONS)
    ]
    scored = await score(str(smollm2), lines, dtype="float32", packed=True)
    differences = [
        np.abs(np.asarray(one.logprobs) - logprobs_of(reference, line.tokens))
        for one, line in zip(scored, lines, strict=True)
    ]
    assert max(one.mean() for one in differences) < 1e-5
    assert max(one.max() for one in differences) < 1e-4
    # Uniform guesses earn -10.8: these are weights that know the language.
    assert np.mean([np.mean(one.logprobs) for one in scored]) > -6


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_real_quickstart_learns(smollm2, runtime, tmp_path, seed):
    """The greedy reward on 64 held-out questions rises by 0.15 with each seed: the command says so with its exit code."""
    command = [sys.executable, "-m", "lockstep.cli.main", "quickstart", "--real", "--path", str(tmp_path / "run")]
    ended = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    line = next(line for line in ended.stdout.splitlines() if line.startswith("greedy reward"))
    before, after = float(line.split()[2]), float(line.split()[4])
    assert math.isfinite(before)
    assert after >= before + 0.149  # printed with three digits
    assert ended.stdout.count("  before  ") == ended.stdout.count("  after   ") == 5
