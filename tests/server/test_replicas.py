"""Two real servers behind one client: they share the rollouts, change version together, and outlive each other.

A run of one server goes before; the run of two is trained on what that one sampled.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter

import pytest
import torch
from openai import AsyncOpenAI
from safetensors.torch import load_file

import lockstep as ls
from frozen_processes import children
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.models.tiny.write import write_tiny

pytestmark = pytest.mark.server
CONFIG = ls.TrainConfig(learning_rate=1e-2)
GROUPS, SIZE, TURNS = 6, 4, 2
STEPS = 3
RETURNS_S = 240.0
"""A new server on a busy machine."""


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    overrides = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    return write_tiny("qwen3", tmp_path_factory.mktemp("base") / "tiny", seed=5, overrides=overrides)


async def registered(base_model, path, **settings):
    backend = MegatronBackend(path=path, max_model_len=512, **settings)
    lora = ls.LoraConfig(rank=8, alpha=16)
    model = ls.TrainableModel(name="replicas", project="tests", base_model=str(base_model), lora=lora)
    await model.register(backend)
    return model, backend


async def rollouts(model, amid=None):
    """Groups of conversations: a group's begin alike, with words that no other group has. amid: awaited by the first rollout
    between its turns.
    """

    async def converse(words: str, reward: float) -> ls.Trajectory:
        client, items = model.openai_client(), [{"role": "user", "content": words}]
        for turn in range(TURNS):
            if turn and amid is not None:
                await amid()
            reply = await client.chat.completions.create(
                model=model.inference_name(), messages=messages(items), max_tokens=16, extra_body={"ignore_eos": True}
            )
            items += [reply.choices[0], {"role": "user", "content": "Go on."}]
        return ls.Trajectory(messages_and_choices=items[:-1], reward=reward)

    beginnings = [" ".join(f"{random.randrange(10**6)}" for _ in range(24)) for _ in range(GROUPS)]
    tries = [[converse(words, float(number)) for number in range(SIZE)] for words in beginnings]
    return await ls.gather_trajectory_groups(tries, progress=False)


def messages(items):
    return [
        item if isinstance(item, dict) else {"role": "assistant", "content": item.message.content} for item in items
    ]


def versions(groups):
    """The versions of each group's tokens."""
    return [
        {
            span["version"]
            for rolled in group.trajectories
            for choice in rolled.choices
            for span in choice.weight_versions
        }
        for group in groups
    ]


async def prefix_hits(servers):
    """(tokens asked for, tokens found) in the servers' prefix caches."""
    names = "prefix_cache_queries_total", "prefix_cache_hits_total"
    return [sum(values) for values in zip(*[await server.counters(*names) for server in servers], strict=True)]


async def share_of_hits(run, model):
    before = await prefix_hits(run.servers)
    groups = await rollouts(model)
    asked, hits = (after - earlier for after, earlier in zip(await prefix_hits(run.servers), before, strict=True))
    return groups, hits / asked


def adapter(backend, model):
    return load_file(backend.run_path(model) / "steps" / f"{model.step:04d}" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
async def alone(runtime, base_model, tmp_path_factory):
    """What one server gave: the groups of three steps, the adapters after each, its share of prefix-cache hits."""
    model, backend = await registered(base_model, tmp_path_factory.mktemp("alone"))
    recorded, adapters = [], []
    try:
        for _ in range(STEPS):
            groups, hits = await share_of_hits(backend.run_info(model), model)
            await backend.train(model, groups, CONFIG)
            recorded.append(groups)
            adapters.append(adapter(backend, model))
    finally:
        await backend.close()
    return recorded, adapters, hits


@pytest.fixture(scope="module")
async def running(alone, base_model, tmp_path_factory):
    """(model, backend) of two servers at step 0."""
    model, backend = await registered(base_model, tmp_path_factory.mktemp("two"), replicas=2)
    yield model, backend
    await backend.close()


async def test_the_same_rollouts_give_the_same_weights_as_with_one_server(running, alone):
    """Bit for bit, three steps; each step is served by both, and verified on both."""
    model, backend = running
    run = backend.run_info(model)
    for groups, expected in zip(alone[0], alone[1], strict=True):
        result = await backend.train(model, groups, CONFIG)
        made = adapter(backend, model)
        assert all(torch.equal(made[name], expected[name]) for name in expected)
        for server in run.servers:
            assert model.inference_name() in await server.models()
        assert result.metrics["sync_bytes"] == 2 * sum(tensor.nbytes for tensor in made.values())
        assert result.metrics["verified_identity"] == 1.0
        assert result.metrics["probe"] < 1e-5


async def test_both_serve_and_find_as_many_prefixes_as_one(running, alone):
    """At least 0.9 of one server's hits; a group's requests are with one of them."""
    model, backend = running
    run = backend.run_info(model)
    before = [await prefix_hits([server]) for server in run.servers]
    groups, hits = await share_of_hits(run, model)
    assert hits >= 0.9 * alone[2]
    after = [await prefix_hits([server]) for server in run.servers]
    took = [now[0] - then[0] for now, then in zip(after, before, strict=True)]
    assert min(took) >= 0.4 * sum(took)
    assert versions(groups) == [{model.inference_name()}] * GROUPS


async def test_one_is_killed_amid_rollouts_and_no_group_is_lost(running):
    """The other answers; a new one gets the published step, is verified, and only then asked."""
    model, backend = running
    run = backend.run_info(model)
    lost, turns = run.servers[0], 0

    async def kill() -> None:
        nonlocal turns
        turns += 1
        if turns == GROUPS * SIZE // 2:
            for pid in children(lost.child.pid):
                os.kill(pid, signal.SIGKILL)

    episodes = [model.episode() for _ in range(4)]
    groups = await rollouts(model, kill)
    assert [len(group.trajectories) for group in groups] == [SIZE] * GROUPS
    assert versions(groups) == [{model.inference_name()}] * GROUPS
    for episode in episodes:  # half of them had their place at the lost server
        async with AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key, max_retries=0) as client:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}], max_tokens=2)
        assert len(episode.trajectory(1.0).choices) == 1
    assert lost not in run.servers
    assert len(run.servers) == 1

    started = time.monotonic()
    while len(run.servers) < 2:
        assert time.monotonic() < started + RETURNS_S
        await asyncio.sleep(0.2)
    new = run.servers[0]
    assert new.replica == lost.replica
    assert new.base_url != lost.base_url
    assert {model.inference_name(), f"replicas@{model.step - 1}"} <= set(await new.models())
    kept = run.store.metrics()[model.step]
    assert kept["server_restarts"] == 1.0
    assert kept["probe"] < 1e-5
    tokens = Counter()
    before = [await prefix_hits([server]) for server in run.servers]
    groups = await rollouts(model)
    for server, then in zip(run.servers, before, strict=True):
        tokens[server.replica] = (await prefix_hits([server]))[0] - then[0]
    assert min(tokens.values()) >= 0.4 * tokens.total()
    result = await backend.train(model, groups, CONFIG)
    assert result.metrics["mismatch_max"] < 1e-5


@pytest.mark.slow
async def test_a_server_that_is_lost_in_a_sync_does_not_hold_it_up(running, monkeypatch):
    """The step reaches the other, is verified there and served; the new server has it too."""
    model, backend = running
    run = backend.run_info(model)
    groups, lost, call = await rollouts(model), run.servers[1], run.trainer.call

    async def struck(request, **how):
        if request.verb == "sync_adapter" and request.root_url == lost.root_url:
            for pid in children(lost.child.pid):
                os.kill(pid, signal.SIGKILL)
        return await call(request, **how)

    monkeypatch.setattr(run.trainer, "call", struck)
    before = model.step
    await backend.train(model, groups, CONFIG)
    monkeypatch.undo()
    assert model.step == before + 1
    assert [server.replica for server in run.servers] == [0]
    assert versions(await rollouts(model)) == [{model.inference_name()}] * GROUPS
    started = time.monotonic()
    while len(run.servers) < 2:
        assert time.monotonic() < started + RETURNS_S
        await asyncio.sleep(0.2)
    assert model.inference_name() in await run.servers[1].models()
