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
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lockstep as ls
from conversations import CONVERSATIONS
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.cli.score import Line, score

QUESTIONS = ["State the final answer: 17 + 25 =", "What is the capital of France?"]


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
        np.abs(np.asarray(row.logprobs) - logprobs_of(reference, line.tokens))
        for row, line in zip(scored, lines, strict=True)
    ]
    assert max(row.mean() for row in differences) < 1e-5
    assert max(row.max() for row in differences) < 1e-4
    # Uniform guesses earn -10.8: these are weights that know the language.
    assert np.mean([np.mean(row.logprobs) for row in scored]) > -6


async def test_one_grpo_step_and_its_sync(smollm2, reference, runtime, tmp_path):
    """fp32, LoRA: what the server samples the trainer and Hugging Face compute, before the step and after its sync."""
    backend = MegatronBackend(path=tmp_path / "runs", dtype="float32", max_model_len=256)
    model = ls.TrainableModel(name="real", project="tests", base_model=str(smollm2), lora=ls.LoraConfig(rank=8))
    try:
        await model.register(backend)
        groups = await ls.gather_trajectory_groups(
            [[_short(model, question) for _ in range(4)] for question in QUESTIONS], progress=False
        )
        result = await backend.train(model, groups, ls.TrainConfig(learning_rate=1e-3))
        assert result.metrics["mismatch"] < 2e-5
        assert result.metrics["mismatch_max"] < 2e-4
        assert result.metrics["grad_norm"] > 0
        _agrees(reference, groups[0].trajectories[0].choices[0], "real@0")
        step = backend.run_path(model) / "steps" / "0001" / "adapter"
        adapted = PeftModel.from_pretrained(reference, step).eval()
        moved = await _ask(model, "How many legs does a spider have?")
        _agrees(adapted, moved, "real@1")
        with adapted.disable_adapter():
            assert _difference(adapted, moved) > 1e-3  # the step changed what the server computes
    finally:
        await backend.close()


async def _ask(model, question, temperature=1.0):
    completion = await model.openai_client().chat.completions.create(
        model=model.inference_name(),
        messages=[{"role": "user", "content": question}],
        temperature=temperature,
        max_tokens=16,
    )
    return completion.choices[0]


async def _short(model, question):
    """A rollout that earns more the fewer characters it has: every group gives a signal."""
    choice = await _ask(model, question)
    messages = [{"role": "user", "content": question}, choice]
    return ls.Trajectory(messages_and_choices=messages, reward=-float(len(choice.message.content or "")))


def _difference(model, choice):
    sampled = choice.sampled_logprobs
    ids = choice.prompt_token_ids + choice.token_ids
    return np.abs(np.asarray(sampled) - logprobs_of(model, ids)[-len(sampled) :]).max()


def _agrees(model, choice, version):
    assert choice.weight_versions[0]["version"] == version
    assert _difference(model, choice) < 2e-4


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
