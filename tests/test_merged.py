"""rollout_weights_mode "merged" on real parts: the trainer streams its weights into vLLM, which then serves the next version.

One server and one trainer per test. Shape suffix: S tokens.
"""

import asyncio
import os
import random
import signal
from pathlib import Path

import numpy as np
import openai
import pytest
import torch

import lockstep as ls
from lockstep.backends import run as backend_run
from lockstep.backends.megatron import MegatronBackend
from lockstep.backends.start import serve_step
from lockstep.errors import ConfigError, MismatchError, ServerError, StaleRolloutError, StoreError
from lockstep.families.tiny import write_tiny
from lockstep.loop import roll_out
from lockstep.quickstart import examples_folder
from lockstep.runfile import load_run_file
from lockstep.task import load_task
from lockstep.warmup import teach

pytestmark = pytest.mark.server
CONFIG = ls.TrainConfig(learning_rate=1e-2)
PROBE_S = np.random.default_rng(3).integers(3, 300, 40).tolist()
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
MIXTURE = {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def task():
    return load_task(examples_folder() / "yes_no_maybe" / "task.py")


@pytest.fixture(scope="module")
def section():
    return load_run_file(examples_folder() / "yes_no_maybe" / "config.toml").task


def taught(family, folder, task, overrides):
    """A tiny model that mostly answers in the task's form: its rewards differ, so its steps move it."""
    write_tiny(family, folder, seed=5, overrides=overrides)
    teach(folder, task.demonstrations(random.Random(5)), steps=40, batch=32, rate=1e-2, seed=5)
    return folder


def hugging_face_logprobs(folder, ids_S, adapter=None):
    """[S-1] log-probability of each token after the first under a Hugging Face folder and a PEFT adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([ids_S])
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)
    return logprobs[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].numpy()


async def check_served(model, backend, folder, adapter=None):
    """The server has the current version and no other name, and computes what Hugging Face computes from the published step."""
    server = backend._run(model).server
    assert await server.models() == [f"{model.name}@{model.step}"]
    served = await server.score(model.inference_name(), PROBE_S)
    # Random tokens are far from what the policy samples, down to -15 nats: fp32 noise grows with the logits.
    np.testing.assert_allclose(served, hugging_face_logprobs(folder, PROBE_S, adapter), atol=1e-5, rtol=1e-5)
    return served


async def answers_until_refused(model, name, max_tokens):
    """Samples from version `name` until the server knows it no more; every choice."""
    choices = []
    client = model.openai_client()
    while True:
        try:
            reply = await client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "yes"}],
                max_tokens=max_tokens,
                extra_body={"ignore_eos": True},
            )
        except openai.NotFoundError:
            return choices
        choices += reply.choices


def trajectory(choice, reward):
    return ls.Trajectory(messages_and_choices=[{"role": "user", "content": "yes"}, choice], reward=reward)


def below(pid):
    """Ids of all processes under `pid`."""
    children = [int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()]
    return [*children, *(deeper for child in children for deeper in below(child))]


async def test_adapters_merged_into_a_dense_model(runtime, task, section, tmp_path, monkeypatch):
    base = taught("qwen3", tmp_path / "base", task, SMALL)
    backend = MegatronBackend(path=tmp_path, rollout_weights_mode="merged", max_model_len=512)
    lora = ls.LoraConfig(rank=8, alpha=16)
    model = ls.TrainableModel(name="merged", project="tests", base_model=str(base), lora=lora)
    await model.register(backend)
    try:
        steps = backend.run_path(model) / "steps"
        before = await check_served(model, backend, base)
        in_flight = []
        for step in range(2):
            assert (model.step, model.inference_name()) == (step, f"merged@{step}")
            groups = await roll_out(model, task, section, step)
            extra = groups[0].trajectories[0].choices[0].model_extra or {}
            assert extra["weight_versions"][0]["version"] == f"merged@{step}"
            # Of different lengths, so that they don't all end just before the swap.
            lengths = (400, 330, 270, 210) if step == 1 else ()
            in_flight = [asyncio.create_task(answers_until_refused(model, f"merged@{step}", n)) for n in lengths]
            result = await backend.train(model, groups, CONFIG)
            assert result.metrics["mismatch_max"] < 1e-5
            assert result.metrics["probe"] < 1e-5
            assert result.metrics["sync_bytes"] == sum(t.numel() * 4 for t in stored_tensors(base))
            served = await check_served(model, backend, base, steps / f"{step + 1:04d}" / "adapter")
            assert np.abs(np.array(served) - before).mean() > 1e-3
            before = served
        choices = [choice for answers in await asyncio.gather(*in_flight) for choice in answers]
        await check_mixed_versions(model, backend, choices)
        await check_stalled_sync(model, backend, task, section, monkeypatch)
        await check_stale_weights_are_seen(model, backend, monkeypatch)
    finally:
        await backend.close()
    again = ls.TrainableModel(name="merged", project="tests", base_model=str(base), lora=lora)
    await again.register(backend)
    try:
        assert again.step == model.step + 1  # what was trained before the sync stalled
        await check_served(again, backend, base, steps / f"{again.step:04d}" / "adapter")
    finally:
        await backend.close()


def stored_tensors(folder):
    from safetensors.torch import load_file

    return [
        t for path in folder.glob("*.safetensors") for name, t in load_file(path).items() if name != "lm_head.weight"
    ]


async def check_mixed_versions(model, backend, choices):
    """A choice that lived through the swap is as old as its oldest token, and can be trained on as such."""
    spans = [choice.weight_versions for choice in choices]
    choices = [choice for choice in choices if len(choice.weight_versions) > 1]
    assert choices, f"no request lived through the swap: {spans}"
    for choice in choices:
        assert [span["version"] for span in choice.weight_versions] == ["merged@1", "merged@2"]
        assert choice.weight_versions[1]["end"] == len(choice.token_ids)
    groups = [ls.TrajectoryGroup(trajectories=[trajectory(choices[0], 1.0), trajectory(choices[-1], 0.0)])]
    with pytest.raises(StaleRolloutError, match="max_steps_off_policy"):
        await backend.train(model, groups, CONFIG)
    result = await backend.train(model, groups, CONFIG.model_copy(update={"max_steps_off_policy": 1}))
    assert result.metrics["steps_off_policy"] == 1.0
    assert result.metrics["mismatch_max"] < 1e-5  # of the tokens that the current version sampled


async def check_stalled_sync(model, backend, task, section, monkeypatch):
    """A server that stops in the middle: a named error within the deadline, the old version served, and the way on."""
    server, step = backend._run(model).server, model.step
    groups = await roll_out(model, task, section, step)
    monkeypatch.setattr(backend_run, "SYNC_DEADLINE_S", 3.0)
    stopped = below(server.child.pid)
    call = backend._run(model).trainer.call

    async def stopping(verb, args, **kwargs):
        if verb == "sync":
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
        return await call(verb, args, **kwargs)

    monkeypatch.setattr(backend._run(model).trainer, "call", stopping)
    with pytest.raises(
        ServerError, match=f"merged@{step + 1} did not reach the server, which still serves merged@{step}"
    ):
        await backend.train(model, groups, CONFIG)
    monkeypatch.undo()
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert model.step == step
    base, adapter = Path(model.base_model), backend.run_path(model) / "steps" / f"{step:04d}" / "adapter"
    await check_served(model, backend, base, adapter)
    with pytest.raises(StoreError, match=f"published step {step + 1} but serves step {step}"):
        await backend.train(model, groups, CONFIG)


async def check_stale_weights_are_seen(model, backend, monkeypatch):
    """Planted fault: the server takes the new name and keeps the old weights."""
    run, name = backend._run(model), f"merged@{model.step + 1}"
    call = run.trainer.call

    async def renaming(verb, args, **kwargs):
        if verb != "sync":
            return await call(verb, args, **kwargs)
        await run.server.rename(args["version"])
        return {"nbytes": 0, "transfer_s": 0.0, "pause_s": 0.0}

    monkeypatch.setattr(run.trainer, "call", renaming)
    with pytest.raises(MismatchError, match=f"does not hold {name}"):
        await backend._serve(run, model, run.store.step(model.step + 1))
    monkeypatch.undo()
    sync = {"root_url": "", "api_key": "", "version": name, "transport": "nccl", "deadline_s": 1.0}
    with pytest.raises(ConfigError, match="'nccl'"):
        await call("sync", sync, deadline_s=60.0)


async def test_all_weights_of_an_untied_model(runtime, task, section, tmp_path):
    """Full fine-tuning; the run goes on after a restart, and a step is served without the trainer."""
    base = taught("qwen3", tmp_path / "base", task, SMALL | {"tie_word_embeddings": False})
    model = ls.TrainableModel(name="full", project="tests", base_model=str(base), lora=None)
    with pytest.raises(ConfigError, match="full weights need rollout_weights_mode 'merged'"):
        await model.register(MegatronBackend(path=tmp_path))
    backend = MegatronBackend(path=tmp_path, rollout_weights_mode="merged", max_model_len=512)
    await model.register(backend)
    try:
        first = await check_served(model, backend, base)
        groups = await roll_out(model, task, section, 0)
        result = await backend.train(model, groups, CONFIG.model_copy(update={"learning_rate": 1e-3}))
        assert result.metrics["mismatch_max"] < 1e-5
        assert result.metrics["probe"] < 1e-5
        folder = backend.run_path(model) / "steps" / "0001"
        served = await check_served(model, backend, folder / "model")
        assert not (folder / "adapter").exists()
        with pytest.raises(ServerError, match="full@0"):
            await backend._run(model).server.score("full@0", [5, 6, 7])
        assert np.abs(np.array(first) - served).mean() > 1e-3
    finally:
        await backend.close()
    server, name = await serve_step(folder.parents[1], None, lambda line: None)
    try:
        assert name == "full@1"
        np.testing.assert_allclose(await server.score(name, PROBE_S), served, atol=1e-6)
    finally:
        await server.close()


@pytest.mark.slow
async def test_a_mixture_trained_on_two_ranks(runtime, task, section, tmp_path):
    """Experts over two ranks, attention split over them: each rank merges what it holds, rank 0 gathers and streams."""
    base = taught("qwen3_moe", tmp_path / "base", task, MIXTURE)
    lora = ls.LoraConfig(rank=8, alpha=16, target_modules=("q_proj", "v_proj", "o_proj", "experts"))
    model = ls.TrainableModel(name="mixture", project="tests", base_model=str(base), lora=lora)
    backend = MegatronBackend(
        path=tmp_path,
        rollout_weights_mode="merged",
        parallel=ls.Parallel(tensor=2, expert=2),
        enable_expert_replay=False,
        max_model_len=512,
    )
    await model.register(backend)
    try:
        first = await check_served(model, backend, base)
        result = await backend.train(model, await roll_out(model, task, section, 0), CONFIG)
        assert result.metrics["mismatch_max"] < 1e-5
        served = await check_served(model, backend, base, backend.run_path(model) / "steps" / "0001" / "adapter")
        assert np.abs(np.array(first) - served).mean() > 1e-3
    finally:
        await backend.close()
