"""rollout_weights_mode "merged" on real parts: the trainer streams its weights into vLLM, which then serves the next version; the second
run takes turns with its server (colocated mode).

One server and one trainer per test. Shape suffix: S tokens.
"""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import lockstep as ls
from frozen_processes import stopped_at
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.backends.megatron.launch import serve_step
from lockstep.backends.megatron.publish import serve
from lockstep.cli.base_models.tiny_sft import teach
from lockstep.cli.quickstart.examples import examples_folder
from lockstep.config import deadlines
from lockstep.errors import ConfigError, MismatchError, ServerError, StaleRolloutError, StoreError, TrainerError
from lockstep.loop.run_file import load_run_file
from lockstep.loop.synchronous import roll_out
from lockstep.loop.task import load_task
from lockstep.models.tiny.write import write_tiny
from lockstep.testing.in_flight import sampled_tokens, seen_running, seen_sampling
from lockstep.trainer.protocol import SyncReport

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
    """The server has the current version, and computes what Hugging Face computes from the published step."""
    server = backend.run_info(model).server
    assert (await server.models())[0] == f"{model.name}@{model.step}"
    assert (await server.version())["version"] == f"{model.name}@{model.step}"
    served = await server.score(model.inference_name(), PROBE_S)
    # Random tokens are far from what the policy samples, down to -15 nats: fp32 noise grows with the logits.
    np.testing.assert_allclose(served, hugging_face_logprobs(folder, PROBE_S, adapter), atol=1e-5, rtol=1e-5)
    return served


async def answers_until_swapped(model, name, max_tokens):
    """Asks for version `name` until other weights answer, as a rollout does that goes on after the swap; every choice."""
    choices = []
    client = model.openai_client()
    while not choices or choices[-1].weight_versions[-1]["version"] == name:
        reply = await client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "yes"}],
            max_tokens=max_tokens,
            extra_body={"ignore_eos": True},
        )
        choices += reply.choices
    return choices


def asked_before_the_sync(model, backend, monkeypatch):
    """The tasks of requests that are sampling when the next sync begins, and asked again until the swap; filled in then.

    They are of different lengths, so that they don't all end just before the swap.
    """
    run, name, tasks = backend.run_info(model), model.inference_name(), []
    call = run.trainer.call

    async def asking(request, **kwargs):
        if request.verb == "sync":
            before = await sampled_tokens(run.server)
            tasks.extend(asyncio.create_task(answers_until_swapped(model, name, 400 - 29 * i)) for i in range(8))
            await seen_sampling(run.server, before)
        return await call(request, **kwargs)

    monkeypatch.setattr(run.trainer, "call", asking)
    return tasks


def trajectory(choice, reward):
    return ls.Trajectory(messages_and_choices=[{"role": "user", "content": "yes"}, choice], reward=reward)


@pytest.mark.slow
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
        model._leases.take(0)  # a rollout that goes on through all of this
        for step in range(2):
            assert (model.step, model.inference_name()) == (step, f"merged@{step}")
            groups = await roll_out(model, task, section, step)
            extra = groups[0].trajectories[0].choices[0].model_extra or {}
            assert extra["weight_versions"][0]["version"] == f"merged@{step}"
            if step == 1:
                in_flight = asked_before_the_sync(model, backend, monkeypatch)
            result = await backend.train(model, groups, CONFIG)
            monkeypatch.undo()
            assert result.metrics["mismatch_max"] < 1e-5
            assert result.metrics["probe"] < 1e-5
            assert result.metrics["sync_bytes"] == sum(t.numel() * 4 for t in stored_tensors(base))
            served = await check_served(model, backend, base, steps / f"{step + 1:04d}" / "adapter")
            assert np.abs(np.array(served) - before).mean() > 1e-3
            before = served
        choices = [choice for answers in await asyncio.gather(*in_flight) for choice in answers]
        await check_mixed_versions(model, backend, choices)
        await check_leased_name(model, backend)
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
    # Of the tokens that the current version sampled: hundreds, some of them far down in the distribution, where fp32 is coarser.
    assert result.metrics["mismatch"] < 2e-6
    assert result.metrics["mismatch_max"] < 3e-5


async def check_leased_name(model, backend):
    """A rollout that still holds its first version is answered, by the current weights, and every reply says so."""
    server, current = backend.run_info(model).server, model.inference_name()
    assert model.step == 3
    assert await server.models() == [current, "merged@0", "merged@2"]
    under_old_name, choice = await server.score_choice("merged@0", PROBE_S)
    assert under_old_name == await server.score(current, PROBE_S)
    assert [span["version"] for span in choice["weight_versions"]] == [current]
    reply = await model.openai_client().completions.create(model="merged@0", prompt=PROBE_S, max_tokens=2)
    assert reply.model == current
    with pytest.raises(ServerError, match="merged@1"):  # nobody holds this one
        await server.score("merged@1", PROBE_S)
    model._leases.give_back(0)


async def check_stalled_sync(model, backend, task, section, monkeypatch):
    """A server that stops in the middle: a named error within the deadline, the old version served, and the way on."""
    step = model.step
    groups = await roll_out(model, task, section, step)
    backend.run_info(model).server.closing.set()  # its watch would end it
    monkeypatch.setattr(deadlines, "SYNC_S", 3.0)
    missed = f"merged@{step + 1} did not reach the server, which still serves merged@{step}"
    with stopped_at(monkeypatch, backend.run_info(model), "sync"), pytest.raises(ServerError, match=missed):
        await backend.train(model, groups, CONFIG)
    monkeypatch.undo()
    assert model.step == step
    base, adapter = Path(model.base_model), backend.run_path(model) / "steps" / f"{step:04d}" / "adapter"
    await check_served(model, backend, base, adapter)
    with pytest.raises(StoreError, match=f"published step {step + 1} but serves step {step}"):
        await backend.train(model, groups, CONFIG)


async def check_stale_weights_are_seen(model, backend, monkeypatch):
    """Planted fault: the server takes the new name and keeps the old weights."""
    run, name = backend.run_info(model), f"merged@{model.step + 1}"
    call = run.trainer.call

    async def renaming(request, **kwargs):
        if request.verb != "sync":
            return await call(request, **kwargs)
        await run.server.rename(request.version)
        return SyncReport(request.version, 0, 0.0, 0.0, 0.0, "staged", "direct", False, {})

    monkeypatch.setattr(run.trainer, "call", renaming)
    with pytest.raises(MismatchError, match=f"does not hold {name}"):
        await serve(run, model.step + 1)
    monkeypatch.undo()
    _, choice = await run.server.score_choice(name, PROBE_S)
    assert choice["weight_versions"][0]["version"] == model.inference_name()  # a name alone makes no version
    with pytest.raises(ServerError, match="merged@0"):  # given back
        await run.server.score("merged@0", PROBE_S)
    sync = {"root_url": "", "api_key": "", "version": name, "transport": "pigeon", "deadline_s": 1.0}
    with pytest.raises(ConfigError, match="'pigeon'"):
        await call("sync", sync, deadline_s=60.0)


@pytest.mark.slow
async def test_all_weights_of_an_untied_model_in_colocated(runtime, task, section, tmp_path, monkeypatch):
    """Full fine-tuning while trainer and server take turns; the run goes on after a restart, and a step is served without the trainer."""
    base = taught("qwen3", tmp_path / "base", task, SMALL | {"tie_word_embeddings": False})
    model = ls.TrainableModel(name="full", project="tests", base_model=str(base), lora=None)
    with pytest.raises(ConfigError, match="full weights need rollout_weights_mode 'merged'"):
        await model.register(MegatronBackend(path=tmp_path))
    with pytest.raises(ConfigError, match="here it is 'gloo' or 'disk'"):
        await model.register(MegatronBackend(path=tmp_path, rollout_weights_mode="merged", weight_transport="nccl"))
    with pytest.raises(ConfigError, match="don't share GPUs"):
        await model.register(MegatronBackend(path=tmp_path, rollout_weights_mode="merged", offload=True))
    together = ls.Placement(trainer="cpu", inference="cpu")
    backend = MegatronBackend(
        path=tmp_path, rollout_weights_mode="merged", max_model_len=2048, placement=together, weight_transport="disk"
    )
    await model.register(backend)
    try:
        first = await check_served(model, backend, base)
        groups = await roll_out(model, task, section, 0)
        await check_server_does_not_sleep_over_requests(model, backend, groups, monkeypatch)
        await check_failed_step_wakes_the_server(model, backend, groups)
        result, waited, order = await trained_in_turns(model, backend, groups, monkeypatch)
        assert result.metrics["mismatch_max"] < 1e-5
        assert result.metrics["probe"] < 1e-5
        folder = backend.run_path(model) / "steps" / "0001"
        served = await check_served(model, backend, folder / "model")
        assert not (folder / "adapter").exists()
        assert np.abs(np.array(first) - served).mean() > 1e-3
        assert waited == served  # asked for full@0 while the server slept
        assert order == ORDER
        await check_server_is_not_left_asleep(model, backend, await roll_out(model, task, section, 1), monkeypatch)
        client = model.openai_client()
    finally:
        await backend.close()
    assert client.is_closed()
    server, name = await serve_step(folder.parents[1], 1, lambda line: None)
    try:
        assert name == "full@1"
        np.testing.assert_allclose(await server.score(name, PROBE_S), served, atol=1e-6)
    finally:
        await server.close()


async def check_server_is_not_left_asleep(model, backend, groups, monkeypatch):
    """The trainer fails while the server sleeps and nothing can wake it with weights: it is ended, and says so to whoever asks."""
    run = backend.run_info(model)
    work = run.trainer.call

    async def worked(request, **kwargs):
        if request.verb == "offload":
            raise TrainerError("planted")
        return await work(request, **kwargs)

    monkeypatch.setattr(run.trainer, "call", worked)
    with pytest.raises(TrainerError, match="planted"):
        await backend.train(model, groups, CONFIG)
    monkeypatch.undo()
    with pytest.raises(ServerError, match="ended"):
        await run.server.score("full@1", PROBE_S)


# Who does what in a step of colocated mode with merged weights and nothing to replay.
ORDER = [
    *("POST /lockstep/sleep", "onload", "score", "train_step", "score", "POST /lockstep/kept_names"),
    *(
        "offload, weights stay",
        "POST /lockstep/wake weights",
        "sync",
        "offload",
        "POST /lockstep/wake weights kv_cache",
    ),
    "POST /v1/completions",
]


async def trained_in_turns(model, backend, groups, monkeypatch):
    """One step, with a request that comes while the server sleeps: (result, its scores, who did what)."""
    run, order, asked = backend.run_info(model), [], []
    serve, work = run.server.call, run.trainer.call

    async def called(method, path, body=None, **kwargs):
        order.append(" ".join([f"{method} {path}", *(body or {}).get("parts", [])]))
        return await serve(method, path, body, **kwargs)

    async def worked(request, **kwargs):
        if request.verb == "train_step":
            before = list(order)
            assert (await run.server.version())["asleep"] == ["kv_cache", "weights"]
            asked.append(asyncio.create_task(run.server.score("full@0", PROBE_S)))
            done, _ = await asyncio.wait(asked, timeout=0.5)
            assert not done
            order[:] = before  # without what this test asked
        keeps = getattr(request, "keep_weights", False)
        order.append(f"{request.verb}, weights stay" if keeps else request.verb)
        return await work(request, **kwargs)

    monkeypatch.setattr(run.server, "call", called)
    monkeypatch.setattr(run.trainer, "call", worked)
    result = await backend.train(model, groups, CONFIG.model_copy(update={"learning_rate": 1e-3}))
    monkeypatch.undo()
    return result, await asked[0], order


async def check_server_does_not_sleep_over_requests(model, backend, groups, monkeypatch):
    """A request that does not end in time stops the step before it begins, and is not harmed."""
    monkeypatch.setattr(deadlines, "IN_FLIGHT_S", 0.3)
    body = {"model": "full@0", "prompt": PROBE_S, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    server = backend.run_info(model).server
    sleep, running = server.sleep, []

    async def sleep_while_one_runs(level: int, *, deadline_s: float) -> None:
        running.append(await seen_running(server, lambda: model.openai_client().completions.create(**body)))
        await sleep(level, deadline_s=deadline_s)

    monkeypatch.setattr(server, "sleep", sleep_while_one_runs)
    with pytest.raises(ServerError, match="still in flight"):
        await backend.train(model, groups, CONFIG)
    monkeypatch.undo()
    (request,) = running
    assert len((await request).choices[0].token_ids) == 1900
    assert (await server.version())["asleep"] == []


async def check_failed_step_wakes_the_server(model, backend, groups):
    """The trainer refuses the step: the server, which forgot its weights asleep, has them again."""
    before = await backend.run_info(model).server.score("full@0", PROBE_S)
    with pytest.raises(MismatchError, match="max_mismatch"):
        await backend.train(model, groups, CONFIG.model_copy(update={"max_mismatch": 1e-12}))
    assert await backend.run_info(model).server.score("full@0", PROBE_S) == before


@pytest.mark.slow
async def test_a_mixture_trained_on_two_ranks(runtime, task, section, tmp_path, monkeypatch):
    """Experts over two ranks, attention split over them: each rank merges and sends what it holds, and replays what the server captured."""
    base = taught("qwen3_moe", tmp_path / "base", task, MIXTURE)
    lora = ls.LoraConfig(rank=8, alpha=16, target_modules=("q_proj", "v_proj", "o_proj", "experts"))
    model = ls.TrainableModel(name="mixture", project="tests", base_model=str(base), lora=lora)
    backend = MegatronBackend(
        path=tmp_path,
        rollout_weights_mode="merged",
        parallel=ls.Parallel(tensor=2, expert=2),
        max_model_len=512,
    )
    await model.register(backend)
    try:
        first = await check_served(model, backend, base)
        result = await backend.train(model, await roll_out(model, task, section, 0), CONFIG)
        check_replayed(result)
        served = await check_served(model, backend, base, backend.run_path(model) / "steps" / "0001" / "adapter")
        assert np.abs(np.array(first) - served).mean() > 1e-3
        await check_lost_server_is_replaced(model, backend, await roll_out(model, task, section, 1), monkeypatch)
        await check_served(model, backend, base, backend.run_path(model) / "steps" / "0002" / "adapter")
    finally:
        await backend.close()


def check_replayed(result):
    """The experts of every rollout token came from the server, which computes with merged weights; the trainer's own are the same."""
    assert result.metrics["expert_choices_differ"] == 0.0  # there is no such metric without replay
    assert result.metrics["mismatch_max"] < 1e-5
    assert result.metrics["probe"] < 1e-5
    assert result.metrics["top1_overlap"] == 1.0


async def check_lost_server_is_replaced(model, backend, groups, monkeypatch):
    """The server dies when the weights are about to leave: the step ends with a new one that has been verified."""
    run = backend.run_info(model)
    lost, work = run.server, run.trainer.call

    async def worked(request, **kwargs):
        if request.verb == "sync" and run.server is lost:
            lost.child.kill()
        return await work(request, **kwargs)

    monkeypatch.setattr(run.trainer, "call", worked)
    result = await backend.train(model, groups, CONFIG)
    monkeypatch.undo()
    assert result.metrics["server_restarts"] == 1.0
    check_replayed(result)
    assert run.server is not lost
    assert result.step == model.step == 2
