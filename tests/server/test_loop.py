"""The whole loop on real parts: vLLM serves, Megatron-Core trains, and what one samples the other computes.

One server and one trainer for the whole file. Shape suffix: S tokens.
"""

import asyncio
import errno
import json
import math
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from openai import AsyncOpenAI, NotFoundError
from safetensors.torch import load_file

import lockstep as ls
from frozen_processes import children, engine_core, stopped_at
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.backends.megatron.launch import serve_step
from lockstep.backends.megatron.publish import serve
from lockstep.cli.base_models.tiny_sft import teach
from lockstep.cli.quickstart.examples import examples_folder
from lockstep.config import deadlines
from lockstep.errors import (
    ConfigError,
    DataError,
    MismatchError,
    RolloutError,
    ServerError,
    StaleRolloutError,
    StoreError,
    TrainerError,
)
from lockstep.loop.evaluation import evaluate, kept, mean_reward
from lockstep.loop.run_file import TaskSection, load_run_file
from lockstep.loop.synchronous import roll_out
from lockstep.loop.task import Task, load_task
from lockstep.metrics.names import is_known
from lockstep.models.tiny.write import write_tiny
from lockstep.rollouts.parquet import read_parquet
from lockstep.runs.database import read_jobs
from lockstep.runs.store import published_steps
from lockstep.trainer.protocol import Save, SyncReport
from random_batches import trajectory

pytestmark = pytest.mark.server
CONFIG = ls.TrainConfig(learning_rate=1e-2)
PROBE_S = np.random.default_rng().integers(3, 300, 40).tolist()


@pytest.fixture(scope="module")
def task():
    return load_task(examples_folder() / "yes_no_maybe" / "task.py")


@pytest.fixture(scope="module")
def section():
    return load_run_file(examples_folder() / "yes_no_maybe" / "config.toml").task


@pytest.fixture(scope="module")
def base_model(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny("qwen3", folder, seed=5, overrides={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128})
    teach(folder, task.demonstrations(random.Random(5)), steps=60, batch=32, rate=1e-2, seed=5)
    return folder


@pytest.fixture(scope="module")
async def running(runtime, base_model, tmp_path_factory):
    """(model, backend) at step 0."""
    backend = MegatronBackend(path=tmp_path_factory.mktemp("runs"), max_model_len=512)
    model = ls.TrainableModel(
        name="loop", project="tests", base_model=str(base_model), lora=ls.LoraConfig(rank=8, alpha=16)
    )
    await model.register(backend)
    yield model, backend
    await backend.close()


def hugging_face_logprobs(base_model, adapter, ids_S, temperature=1.0):
    """[S-1] log-probability of each token after the first, from the PEFT library on the Hugging Face model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_model)
    model = PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([ids_S])
    with torch.no_grad():
        logprobs = (model(ids).logits / temperature).log_softmax(-1)
    return logprobs[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].numpy()


def with_signal(groups):
    """The same rollouts with rewards that differ: a policy that is right every time gives a step that changes nothing."""
    for group in groups:
        for number, rolled in enumerate(group.trajectories):
            rolled.reward = float(number)
    return groups


async def test_what_was_sampled_is_what_is_trained(running, task, section, base_model):
    """fp32: trainer, server and PEFT agree to 1e-5 on a rollout's tokens, at the first step and with a trained adapter."""
    model, backend = running
    section = section.model_copy(update={"temperature": 0.8})
    for step in range(3):
        groups = with_signal(await roll_out(model, task, section, step))
        result = await backend.train(model, groups, CONFIG)
        assert result.metrics["mismatch_max"] < 1e-5
        adapter = backend.run_path(model) / "steps" / f"{step:04d}" / "adapter"
        weights = load_file(adapter / "adapter_model.safetensors")
        moved = max(float(tensor.abs().max()) for name, tensor in weights.items() if "lora_B" in name)
        assert (moved > 1e-3) == (step > 0)
        choice = groups[0].trajectories[0].choices[0]
        ids = choice.prompt_token_ids + choice.token_ids
        sampled = choice.sampled_logprobs
        expected = hugging_face_logprobs(base_model, adapter, ids, temperature=0.8)[-len(sampled) :]
        np.testing.assert_allclose(sampled, expected, atol=1e-5)
        assert choice.weight_versions[0]["version"] == f"loop@{step}"
    assert result.metrics["probe"] < 1e-5
    assert result.metrics["top1_overlap"] == 1.0
    assert result.metrics["top20_overlap"] > 0.995  # two tokens may be as likely as each other, up to rounding
    for name in (
        "loss",
        "reward",
        "kl",
        "clip_fraction",
        "entropy",
        "ess",
        "grad_norm",
        "tokens_per_second",
        "mismatch",
    ):
        assert math.isfinite(result.metrics[name]), name
    assert result.metrics["grad_norm"] > 0


async def test_most_likely_tokens_are_compared_where_rollouts_bring_them(running):
    """On what was sampled; with the ids of every other token replaced, half of it is left."""
    model, backend = running
    completion = await model.openai_client().chat.completions.create(
        model=model.inference_name(),
        messages=[{"role": "user", "content": "yes or no?"}],
        n=4,
        max_tokens=20,
        top_logprobs=20,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    )
    trajectories = [
        ls.Trajectory(messages_and_choices=[{"role": "user", "content": "yes or no?"}, choice], reward=float(number))
        for number, choice in enumerate(completion.choices)
    ]
    config = ls.TrainConfig(learning_rate=1e-6, max_steps_off_policy=1)
    result = await backend.train(model, [ls.TrajectoryGroup(trajectories=trajectories)], config)
    assert result.metrics["rollout_top1_overlap"] == 1.0
    assert result.metrics["rollout_top20_overlap"] > 0.99
    kept = await backend.train(model, [ls.TrajectoryGroup(trajectories=trajectories)], config)
    assert "rollout_top1_overlap" not in kept.metrics  # the step before sampled them


async def check_served(server, name, base_model, adapter):
    """The server computes, as `name`, what PEFT computes from the published folder; its scores."""
    served = await server.score(name, PROBE_S)
    # Random tokens are far from what the policy samples, down to -15 nats: fp32 noise grows with the logits.
    expected = hugging_face_logprobs(base_model, adapter, PROBE_S)
    np.testing.assert_allclose(served, expected, atol=1e-5, rtol=1e-5)
    return served


async def test_the_server_has_a_step_before_the_disk_has_it(running, task, section, base_model, monkeypatch):
    """The adapter comes from the trainer's memory: served while its folder is not yet written, and the same as the folder then."""
    model, backend = running
    run, name, early = backend.run_info(model), f"loop@{model.step + 1}", []
    call = run.trainer.call

    async def saving(request, **kwargs):
        if request.verb == "save":
            assert published_steps(run.store.path)[-1] == model.step
            early.append(await run.server.score(name, PROBE_S))
        return await call(request, **kwargs)

    async def never(*_arguments):
        raise AssertionError("the server was sent to the disk")

    monkeypatch.setattr(run.trainer, "call", saving)
    monkeypatch.setattr(run.server, "load_adapter", never)
    result = await backend.train(model, with_signal(await roll_out(model, task, section, model.step)), CONFIG)
    monkeypatch.undo()
    assert await check_served(run.server, name, base_model, result.checkpoint_path / "adapter") == early[0]
    weights = load_file(result.checkpoint_path / "adapter" / "adapter_model.safetensors")
    assert result.metrics["sync_bytes"] == sum(tensor.nbytes for tensor in weights.values())
    for seconds in ("seconds_sync", "seconds_sync_transfer", "seconds_sync_pause", "seconds_publish"):
        assert result.metrics[seconds] > 0, seconds
    assert run.store.metrics()[result.step]["sync_bytes"] == result.metrics["sync_bytes"]
    names = {name for metrics in run.store.metrics().values() for name in metrics}
    assert not {name for name in names if not is_known(name)}


async def test_old_versions_are_unloaded_unless_a_rollout_uses_them(running, task, section):
    model, backend = running
    server = backend.run_info(model).server

    async def slow(scenario):
        pinned = model.inference_name()
        groups = with_signal(await roll_out(model, task, section, model.step))
        for _ in range(3):
            await backend.train(model, groups, ls.TrainConfig(learning_rate=1e-6, max_steps_off_policy=5))
        assert model.inference_name() == pinned
        assert pinned in await server.models()
        assert before in published_steps(backend.run_path(model))  # audit B5: its folder, too
        return await task.rollout(model, scenario, 1.0)

    before = model.step
    await ls.gather_trajectory_groups([[slow(task.scenarios[0])]], progress=False)
    groups = with_signal(await roll_out(model, task, section, model.step))
    result = await backend.train(model, groups, CONFIG)
    served = {name for name in await server.models() if not name.endswith("@base")}
    assert served == {f"loop@{model.step}", f"loop@{model.step - 1}"}
    (memory,) = (await server.call("GET", "/lockstep/memory")).json()["workers"]
    assert memory["adapters"] == 2 * result.metrics["sync_bytes"]
    assert model.step == before + 4
    kept = sorted({0, *range(before + 2, before + 5)})
    assert published_steps(backend.run_path(model)) == kept
    steps = backend.run_path(model) / "steps"
    assert [(steps / f"{step:04d}" / "trainer").is_dir() for step in kept] == [False] * (len(kept) - 1) + [True]
    with pytest.raises(
        NotFoundError, match=rf"`loop@{before}` is no longer served: ask for .*, which is loop@{model.step} now"
    ):
        await model.openai_client().chat.completions.create(
            model=f"loop@{before}", messages=[{"role": "user", "content": "?"}]
        )


async def test_behaviour_alone_sees_a_stale_adapter(running, task, section, monkeypatch):
    """Planted fault: the server keeps serving the step before under the new name."""
    model, backend = running
    run = backend.run_info(model)
    call = run.trainer.call

    async def stale(request, **kwargs):
        if request.verb != "sync_adapter":
            return await call(request, **kwargs)
        await run.server.load_adapter(request.version, run.store.step(model.step).adapter)
        return SyncReport(request.version, 0, 0.0, 0.0, 0.0, "staged", "adapter", False, {})

    monkeypatch.setattr(run.trainer, "call", stale)
    groups = with_signal(await roll_out(model, task, section, model.step))
    step = model.step
    with pytest.raises(MismatchError, match=f"does not hold loop@{step + 1}") as caught:
        await backend.train(model, groups, CONFIG)
    monkeypatch.undo()
    agreed = re.search(r"most likely tokens agree by (\S+)% \(of the 20 most likely (\S+)%\)", str(caught.value))
    assert agreed is not None
    assert 20 < float(agreed[2]) < 99.5  # one step apart: alike, and not the same
    assert model.step == step
    await run.server.unload_adapter(f"loop@{step + 1}")
    run.store.step(step + 1)  # trained and published, so not lost
    await serve(run, step + 1)
    model._advance(step + 1)


async def test_a2_a_step_that_computes_nothing_finite_is_never_served(running, task, section):
    """The newcomer's case: a good step, then learning_rate 1e30, whose adapter is finite and whose logits are not."""
    model, backend = running
    run = backend.run_info(model)
    good = await backend.train(model, with_signal(await roll_out(model, task, section, model.step)), CONFIG)
    served, tokens = await run.server.models(), run.probe.tokens[0]
    scored = await run.server.score(f"loop@{good.step}", tokens)
    groups = with_signal(await roll_out(model, task, section, model.step))
    refused = rf"loop@{good.step + 1} computes .* not finite, and is not served: the weights are unchanged, lower learning_rate"
    with pytest.raises(TrainerError, match=refused):
        await backend.train(model, groups, ls.TrainConfig(learning_rate=1e30))
    assert model.step == run.store.published()[-1] == good.step
    assert await run.server.models() == served
    assert await run.server.score(f"loop@{good.step}", tokens) == scored
    result = await backend.train(model, groups, CONFIG)
    assert result.step == good.step + 1
    assert result.metrics["verified_identity"] == 1.0
    assert result.metrics["verification_power"] > 1.0  # in fp32 any step is far from the one before


async def test_kl_penalty_changes_the_gradient(running, task, section):
    """The same rollouts with and without it; the penalty is positive once the policy has moved from its reference."""
    model, backend = running
    groups = with_signal(await roll_out(model, task, section, model.step))
    still = ls.TrainConfig(learning_rate=1e-9, max_steps_off_policy=1)
    plain = await backend.train(model, groups, still)
    pulled = await backend.train(model, groups, still.model_copy(update={"kl_coef": 10.0, "kl_reference_step": 0}))
    assert pulled.metrics["kl_reference"] > 0
    assert pulled.metrics["grad_norm"] != pytest.approx(plain.metrics["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("how", ["the disk is full", "the caller gives up"])
async def test_a_step_that_was_not_published_is_not_built_upon(running, task, section, monkeypatch, how):
    """The same rollouts again: the trainer, which had moved on, holds the weights that sampled them."""
    model, backend = running
    run, step = backend.run_info(model), model.step
    groups = with_signal(await roll_out(model, task, section, step))
    ask = run.trainer.call

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def given_up(request, **settings):
        reply = await ask(request, **settings)
        if request.verb == "train_step":
            raise asyncio.CancelledError
        return reply

    with monkeypatch.context() as patched:
        if how == "the disk is full":
            patched.setattr(run.store, "publish", full)
        else:
            patched.setattr(run.trainer, "call", given_up)
        with pytest.raises((OSError, asyncio.CancelledError)):
            await backend.train(model, groups, CONFIG)
    assert (model.step, published_steps(run.store.path)[-1]) == (step, step)
    result = await backend.train(model, groups, CONFIG)
    assert result.step == step + 1
    assert result.metrics["mismatch_max"] < 1e-5


async def test_calls_of_train_take_turns(running, task, section):
    model, backend = running
    step, groups = model.step, with_signal(await roll_out(model, task, section, model.step))
    later = CONFIG.model_copy(update={"max_steps_off_policy": 1})
    results = await asyncio.gather(*(backend.train(model, groups, later) for _ in range(2)))
    assert [result.step for result in results] == [step + 1, step + 2]
    assert model.step == step + 2


async def bad_groups(kind, model, task):
    good = await task.rollout(model, task.scenarios[0], 1.0)
    if kind == "empty batch":
        return []
    if kind == "group of one":
        return [ls.TrajectoryGroup(trajectories=[good])]
    if kind == "no sampled token":
        silent = ls.Trajectory(messages_and_choices=[{"role": "user", "content": "hi"}], reward=1.0)
        return [ls.TrajectoryGroup(trajectories=[good, silent])]
    if kind == "greedy":
        greedy = await task.rollout(model, task.scenarios[0], 0.0)
        return [ls.TrajectoryGroup(trajectories=[good, greedy])]
    stale = good.model_copy(deep=True)
    versions = {"stale": f"loop@{model.step - 1}", "foreign": "other@3", "from the future": f"loop@{model.step + 1}"}
    stale.choices[0].weight_versions[0]["version"] = versions[kind]
    return [ls.TrajectoryGroup(trajectories=[good, stale])]


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("empty batch", DataError, "the batch is empty"),
        ("group of one", DataError, "group 0 has 1 trajectory"),
        ("no sampled token", DataError, "group 0, trajectory 1"),
        ("greedy", DataError, "temperature"),
        ("stale", StaleRolloutError, "max_steps_off_policy"),
        ("foreign", StaleRolloutError, "other@3"),
        ("from the future", StaleRolloutError, "another run"),
    ],
)
async def test_bad_batches_are_refused_and_change_nothing(running, task, kind, error, says):
    model, backend = running
    step, published = model.step, published_steps(backend.run_path(model))
    groups = await bad_groups(kind, model, task)
    with pytest.raises(error, match=says) as caught:
        await backend.train(model, groups, CONFIG)
    assert "\n" not in str(caught.value)
    assert (model.step, published_steps(backend.run_path(model))) == (step, published)


async def test_a_rollout_that_raises_loses_nothing(running, task, section, tmp_path):
    """The finished rollouts of the step are on disk, and the error names the first failure."""
    from lockstep.loop.synchronous import run

    model, backend = running
    calls = 0

    async def sometimes(model, scenario, temperature):
        nonlocal calls
        if temperature:
            calls += 1
            if calls == 20:
                raise ValueError("the environment fell over")
        return await task.rollout(model, scenario, temperature)

    broken = replace(task, rollout=sometimes)
    limited = section.model_copy(update={"steps": model.step + 1, "stop_at_reward": None, "max_exceptions": 0})
    step = model.step
    with pytest.raises(RolloutError, match="the environment fell over"):
        await run(model, backend, broken, limited, CONFIG, tmp_path, lambda row: None)
    kept = read_parquet(tmp_path / "trajectories" / "train" / f"{step + 1:04d}.parquet")
    assert any(failure.message == "the environment fell over" for group in kept for failure in group.exceptions)
    assert model.step == step


async def test_an_evaluation_tolerates_what_a_step_does():
    async def flaky(model, scenario, temperature):
        if scenario == 1:
            raise ValueError("the environment fell over")
        return trajectory(reward=scenario)

    some = Task(Path("task.py"), [0.0, 1.0, 2.5], flaky, None)
    section = TaskSection(file="task.py", steps=1, evaluate_scenarios=3, max_exceptions=0.4)
    assert mean_reward(await evaluate(None, some, section)) == 1.25
    everything = section.model_copy(update={"max_exceptions": 1})
    assert math.isnan(mean_reward(await evaluate(None, replace(some, scenarios=[1]), everything)))
    with pytest.raises(RolloutError, match="fell over"):
        await evaluate(None, some, section.model_copy(update={"max_exceptions": 0}))


async def test_a_nan_reward_is_named(running, task):
    model, _ = running

    async def nan(scenario):
        trajectory = await task.rollout(model, scenario, 1.0)
        trajectory.reward = float("nan")
        return trajectory

    with pytest.raises(RolloutError, match="reward is nan"):
        await ls.gather_trajectory_groups([[nan(task.scenarios[0])]], progress=False)


async def check_torn_sync(model, backend, groups, monkeypatch):
    """The server stops when the adapter is about to leave: a named error within the deadline, the old version served.

    What was trained is published.
    """
    run, step = backend.run_info(model), model.step
    before = await run.server.score(model.inference_name(), PROBE_S)
    run.server.closing.set()  # its watch would end it
    monkeypatch.setattr(deadlines, "SYNC_S", 3.0)
    missed = f"loop@{step + 1} did not reach the server, which still serves loop@{step}"
    with stopped_at(monkeypatch, run, "sync_adapter"), pytest.raises(ServerError, match=missed):
        await backend.train(model, groups, CONFIG)
    monkeypatch.undo()
    assert (model.step, published_steps(run.store.path)[-1]) == (step, step + 1)
    assert await run.server.score(model.inference_name(), PROBE_S) == before
    assert f"loop@{step + 1}" not in await run.server.models()
    with pytest.raises(StoreError, match=f"published step {step + 1} but serves step {step}"):
        await backend.train(model, groups, CONFIG)


async def test_c3_an_engine_that_dies_at_a_sync_is_noticed_and_replaced(running, task, section, monkeypatch):
    """The sync once waited five minutes for it, then ended the run with a sentence that was not true."""
    model, backend = running
    run, lost = backend.run_info(model), backend.run_info(model).server
    groups = with_signal(await roll_out(model, task, section, model.step))
    call, asked = run.trainer.call, []

    async def killing(request, **kwargs):
        if request.verb == "sync_adapter" and not asked:
            asked.append(time.monotonic())
            os.kill(engine_core(lost), signal.SIGKILL)
        return await call(request, **kwargs)

    monkeypatch.setattr(run.trainer, "call", killing)
    result = await backend.train(model, groups, CONFIG)
    assert time.monotonic() - asked[0] < 120  # of which the new server's start takes some 20
    assert result.metrics["server_restarts"] == 1.0
    assert run.server is not lost
    assert result.metrics["probe_ratio"] <= 5
    assert (await run.server.models())[-1] == model.inference_name()


@pytest.mark.slow
async def test_c4_a_server_that_dies_in_the_verification_is_replaced(running, task, section, monkeypatch):
    model, backend = running
    run, lost = backend.run_info(model), backend.run_info(model).server
    groups = with_signal(await roll_out(model, task, section, model.step))
    score = lost.score_choices

    async def killed(*arguments):
        os.kill(engine_core(lost), signal.SIGKILL)
        return await score(*arguments)

    monkeypatch.setattr(lost, "score_choices", killed)
    result = await backend.train(model, groups, CONFIG)
    assert result.metrics["server_restarts"] == 1.0
    assert run.server is not lost
    assert result.metrics["mismatch_max"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["engine", "api"])
async def test_h3_rollouts_of_a_lost_server_begin_again_on_a_new_one(running, task, section, tmp_path, killed):
    """The error once named no server, and the run ended; with failures tolerated, all of them failed without a word."""
    model, backend = running
    lost, attempts = backend.run_info(model).server, []

    async def gather(finished):
        attempts.append(backend.run_info(model).server)
        if attempts == [lost]:
            os.kill(engine_core(lost) if killed == "engine" else children(lost.child.pid)[0], signal.SIGKILL)
        return await roll_out(model, task, section, model.step, finished)

    groups = await kept(gather, model, backend, tmp_path / "kept.parquet", model.step, "rollouts")
    assert attempts == [lost, backend.run_info(model).server]
    assert attempts[1] is not lost
    assert not any(group.exceptions for group in groups)
    assert (await backend.train(model, with_signal(groups), CONFIG)).metrics["mismatch_max"] < 1e-5


async def test_an_agent_that_knows_an_address_alone_is_trained(running, monkeypatch):
    """Two turns of an agent with a client of its own. Each attempt is one sequence, and the trainer computes what the server sampled."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # the client is built as a user builds one
    model, backend = running

    async def rollout(number):
        messages = [{"role": "user", "content": "yes, no or maybe?"}]
        with model.episode(sampling={"temperature": 1.0}) as episode:
            async with AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key) as agent:
                for _ in range(2):
                    reply = await agent.chat.completions.create(model="gpt-5", messages=messages, max_tokens=6)
                    messages += [reply.choices[0].message.model_dump(), {"role": "user", "content": "And now?"}]
            return episode.trajectory(reward=float(number % 2))

    (group,) = await ls.gather_trajectory_groups([[rollout(number) for number in range(4)]], progress=False)
    sampled = sum(len(choice.token_ids) for trajectory in group.trajectories for choice in trajectory.choices)
    result = await backend.train(model, [group], CONFIG)
    assert result.metrics["mismatch_max"] < 1e-5
    assert result.metrics["sequences"] == 4
    assert result.metrics["tokens_sampled"] == sampled
    assert result.metrics["turns_split"] == 0


async def test_chats_teach_the_served_model_between_steps_of_rollouts(running, task, section):
    """A supervised step is published, served, verified and kept as a job; rollouts of it train the next step; bad chats change
    nothing."""
    model, backend = running
    chats, config = task.demonstrations(random.Random(6))[:12], ls.SFTConfig(learning_rate=3e-3)
    before = model.step
    with pytest.raises(
        DataError, match="the batch: 1 of 13 rows can't be trained on: row 12: no message of an assistant"
    ):
        await backend.train_sft(model, [*chats, {"messages": [{"role": "user", "content": "?"}]}], config)
    assert model.step == before
    losses = []
    for number in range(1, 4):
        result = await backend.train_sft(model, chats, config)
        losses.append(result.metrics["loss"])
        assert result.step == model.step == before + number
    assert losses[2] < losses[0]
    assert result.metrics["verified_identity"] == 1
    assert result.metrics["probe"] < 1e-5
    assert all(map(is_known, result.metrics))
    job = read_jobs(backend.run_path(model))[-1]
    assert (job.step, job.kind, job.state) == (before + 3, "sft_step", "done")
    after = await backend.train(model, with_signal(await roll_out(model, task, section, model.step)), CONFIG)
    assert after.step == before + 4
    assert after.metrics["mismatch_max"] < 1e-5


async def test_resume_continues_from_the_last_step(running, task, section, base_model, monkeypatch):
    """Last, since it closes the shared run: after a torn sync the next process serves what was trained, and trains on.

    The optimizer's moments and the adapter come back byte for byte.
    """
    model, backend = running
    await check_torn_sync(model, backend, with_signal(await roll_out(model, task, section, model.step)), monkeypatch)
    path, step = backend.path, model.step + 1
    published = backend.run_path(model) / "steps" / f"{step:04d}"
    trainer_state = (published / "trainer" / "optimizer.safetensors").read_bytes()
    first_seed = backend.run_info(model).settings.server_config("m").seed
    await backend.close()
    other = ls.TrainableModel(name="loop", project="tests", base_model=str(base_model), lora=ls.LoraConfig(rank=16))
    with pytest.raises(StoreError, match="lora"):
        await other.register(MegatronBackend(path=path, max_model_len=512))
    again = model  # its backend is closed, so another one may have it
    resumed = MegatronBackend(path=path, max_model_len=512)
    try:
        await again.register(resumed)
        assert again.step == step
        # Audit A8: the new server does not begin the old one's noise again.
        assert resumed.run_info(again).settings.server_config("m").seed != first_seed
        await check_served(resumed.run_info(again).server, f"loop@{step}", base_model, published / "adapter")
        out = path / "saved"
        await resumed.run_info(again).trainer.call(Save(out), deadline_s=60)
        assert (out / "trainer" / "optimizer.safetensors").read_bytes() == trainer_state
        result = await resumed.train(again, with_signal(await roll_out(again, task, section, step)), CONFIG)
        assert result.step == step + 1
        assert result.metrics["mismatch_max"] < 1e-5
        jobs = read_jobs(resumed.run_path(again))
        assert [(job.step, job.kind, job.state) for job in jobs[-2:]] == [
            (step, "first_sync", "done"),
            (step + 1, "lora_step", "done"),
        ]
        assert "TrainerError" in {job.error_type for job in jobs if job.state == "failed"}
        assert not any(job.state in ("queued", "running") for job in jobs)
        assert resumed.run_info(again).server.api_key not in repr(jobs)
    finally:
        await resumed.close()


async def test_serve_step_needs_a_run(tmp_path):
    with pytest.raises(StoreError, match="is not a run"):
        await serve_step(tmp_path, None, lambda line: None)


def test_unknown_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout_weights_mode|learning_rat"):
        ls.TrainConfig(learning_rat=1e-3)
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\nname = "a"\nproject = "b"\nbase_model = "c"\n[task]\nfile = "t.py"\nsteps = 1\n[train]\nlr = 1\n'
    )
    with pytest.raises(ConfigError, match="'lr'"):
        load_run_file(file)
    assert json.loads(ls.TrainConfig().model_dump_json())["loss"] == "cispo"
