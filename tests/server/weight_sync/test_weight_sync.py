"""Merged weights into a running vLLM server, against Hugging Face; what fails on the way leaves the old version."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
import threading

import httpx
import pytest
import torch
from openai import AsyncOpenAI, NotFoundError
from safetensors.torch import load_file, save_file

import sender_ranks
from lockstep.engine.weight_sync.buckets import describe
from lockstep.engine.weight_sync.plan import make_plan
from lockstep.engine.weight_sync.sender import Endpoint, WeightPusher
from lockstep.errors import MismatchError, ServerError, WeightsError
from lockstep.inference.launch import ServerConfig, launch
from lockstep.models.tiny.write import write_tiny
from lockstep.process.child import child_env, spawn
from lockstep.testing.in_flight import sampled_tokens, seen_sampling
from lockstep.testing.programs import torchrun
from lockstep_wire.transports.gloo import GlooSender
from sync_driver import change, checkpoint_weights, flip_one_bit, hf_logprobs, load, settled

pytestmark = pytest.mark.server

TOKENS = torch.randint(3, 320, (48,), generator=torch.Generator().manual_seed(8)).tolist()


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def folder(request, tmp_path_factory):
    return write_tiny(request.param, tmp_path_factory.mktemp("models") / request.param, seed=21)


@pytest.fixture(scope="module")
async def merged(runtime, folder, tmp_path_factory):
    """A server, and the trainer's model of the weights that it holds."""
    config = ServerConfig(
        model=folder, served_name="policy@0", dtype="float32", max_model_len=512, max_num_seqs=8, threads=1
    )
    server = await launch(config, runtime, tmp_path_factory.mktemp("run"))
    yield server, load(folder)
    await server.close()


@pytest.fixture(scope="module")
async def pusher(merged, folder):
    server, model = merged
    plan = make_plan(describe(checkpoint_weights(model, folder)), bucket_bytes=40_000)
    assert len(plan.buckets) > 5
    pusher = WeightPusher(Endpoint(server.root_url, server.api_key), GlooSender(90.0), plan, deadline_s=200.0)
    await asyncio.to_thread(pusher.connect)
    yield pusher
    pusher.close()


async def served(server, name: str) -> torch.Tensor:
    return torch.tensor(await server.score(name, TOKENS))


async def test_ten_random_steps(merged, pusher, folder):
    server, model = merged
    name = (await server.models())[0]
    for step in range(1, 11):
        before = await served(server, name)
        change(model, step)
        report = await asyncio.to_thread(
            pusher.push, checkpoint_weights(model, folder), f"policy@{step}", f"policy@{step}"
        )
        old, name = name, f"policy@{step}"
        assert report.version == name
        assert await server.models() == [name]
        after = await served(server, name)
        torch.testing.assert_close(after, hf_logprobs(model, TOKENS), atol=1e-5, rtol=0)
        assert (after - before).abs().mean() > 1e-3
        # The same prompt at every step: keys and values cached under older weights would show here.
        body = {"model": name, "prompt": TOKENS, "max_tokens": 4, "ignore_eos": True}
        choice = (await server.call("POST", "/v1/completions", body)).json()["choices"][0]
        assert choice["weight_versions"] == [{"version": name, "start": 0, "end": 4}]
        reference = hf_logprobs(model, TOKENS + choice["token_ids"])[-4:]
        torch.testing.assert_close(torch.tensor(choice["sampled_logprobs"]), reference, atol=1e-5, rtol=0)
        with pytest.raises(ServerError, match=old):  # the alias of before is gone
            await server.score(old, TOKENS)


def reference(folder, weights, where):
    """The Hugging Face model of `folder` with other weights."""
    shutil.copytree(folder, where, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    return load(where)


async def test_two_trainer_ranks_send_what_they_hold(merged, pusher, folder, tmp_path):
    """Matrices split over two ranks, and for the mixture experts too: all weights trained, or adapters merged on the way."""
    server, model = merged
    mixture = folder.name == "qwen3_moe"
    targets = ["q_proj", "k_proj", "o_proj", "experts"]
    settings = {
        "model": str(folder),
        "parallel": {"tensor": 2, "expert": 2 if mixture else 1},
        "lora": {"rank": sender_ranks.RANK, "alpha": 2.0 * sender_ranks.RANK, "targets": targets} if mixture else None,
    }
    answer, job = tmp_path / "answer.json", tmp_path / "job.json"
    port = int(server.root_url.rpartition(":")[2])
    steps = 10
    job.write_text(
        json.dumps(
            {"settings": settings, "tokens": TOKENS, "port": port, "api_key": server.api_key, "answer": str(answer)}
            | {"steps": steps}
        )
    )
    command = torchrun(2, sender_ranks.__file__, str(job))
    child = spawn(command, child_env({"OMP_NUM_THREADS": "1"}), tmp_path / "log", "two ranks")
    status = await asyncio.to_thread(child.wait, 600.0)
    assert status == 0, child.log_tail(40)
    report = json.loads(answer.read_text())
    base = load_file(folder / "model.safetensors")
    modules = {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in base.items()
        if any(f".{target}" in name for target in targets) and name.endswith("_proj.weight")
    }
    before = None
    for step in range(1, steps + 1):
        pairs = sender_ranks.adapter(modules, step)
        weights = sender_ranks.merged(base, pairs) if mixture else sender_ranks.changed(base, step)
        expected = hf_logprobs(reference(folder, weights, tmp_path / f"{step}"), TOKENS)
        scores = torch.tensor(report["scores"][step - 1])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-6)
        assert before is None or (scores - before).abs().mean() > 1e-3
        before = scores
    # Neither sends for both, and what both hold is sent once.
    assert sum(report["sizes"]) == report["report"]["nbytes"] == sum(weight.nbytes for weight in base.values())
    assert max(report["sizes"]) < 0.6 * sum(report["sizes"])
    pusher.close()  # the ranks' connection took its place
    # The server holds what `model` says again, as the other tests expect.
    await asyncio.to_thread(pusher.push, checkpoint_weights(model, folder), "policy@back", "policy@back")


async def test_requests_in_flight_survive_and_say_what_made_them(merged, pusher, folder):
    server, model = merged
    (name,) = await server.models()
    old = copy.deepcopy(model)
    change(model, 100)
    stream = checkpoint_weights(model, folder)
    http_client = httpx.AsyncClient(trust_env=False)
    async with AsyncOpenAI(base_url=server.base_url, api_key=server.api_key, http_client=http_client) as client:
        running = threading.Event()

        def held_back():
            """The last weight leaves when the requests are running."""
            for position, weight in enumerate(stream):
                assert position + 1 < len(stream) or running.wait(100.0)
                yield weight

        push = asyncio.create_task(asyncio.to_thread(pusher.push, held_back(), "policy@100", "policy@100"))
        sampled_before = await sampled_tokens(server)

        async def keep_asking(i: int) -> list:
            """One request after the other until the swap, of lengths that never end together with the others'."""
            versions = []
            while not push.done():
                now = (await server.models())[0]
                asked = {
                    "model": now,
                    "prompt": [70 + i],
                    "max_tokens": 500 - 31 * i,
                    "extra_body": {"ignore_eos": True},
                }
                try:
                    versions.append((asked["max_tokens"], await client.completions.create(**asked)))
                except NotFoundError:  # the swap came between the two calls
                    assert (await server.models())[0] != now
            return versions

        tasks = [asyncio.create_task(keep_asking(i)) for i in range(8)]
        await seen_sampling(server, sampled_before)
        running.set()
        await push
        replies = [reply for task in tasks for reply in await task]
    split = compared = 0
    for asked_for, reply in replies:
        choice = reply.choices[0]
        spans, ids = choice.model_extra["weight_versions"], choice.model_extra["token_ids"]
        assert len(ids) == asked_for
        assert [span["version"] for span in spans] in ([name], [name, "policy@100"], ["policy@100"])
        assert [0, *[span["end"] for span in spans]] == [*[span["start"] for span in spans], asked_for]
        split += len(spans) == 2
        sampled = torch.tensor(choice.sampled_logprobs)
        for span in spans:
            model_then = model if span["version"] == "policy@100" else old
            tokens = choice.model_extra["prompt_token_ids"] + ids
            part = slice(span["start"], min(span["end"], settled(model_then, tokens)))
            torch.testing.assert_close(sampled[part], hf_logprobs(model_then, tokens)[part], atol=2e-5, rtol=0)
            compared += len(sampled[part])
    assert split > 0
    assert compared > 0.8 * sum(asked_for for asked_for, _ in replies)


async def test_faults_leave_the_old_version(merged, pusher, folder, monkeypatch):
    """One tensor dropped, one in another shape, one bucket swapped, a stream that ends or goes on."""
    server, model = merged
    (name,) = await server.models()
    before = await served(server, name)
    good = checkpoint_weights(model, folder)

    async def push(stream, error, match):
        with pytest.raises(error, match=match):
            await asyncio.to_thread(pusher.push, stream, "policy@bad", "policy@bad")
        assert await server.models() == [name]
        assert torch.equal(await served(server, name), before)

    await push(good[:-1], WeightsError, "end before")
    await push([*good, ("extra", torch.zeros(1))], WeightsError, "'extra'")
    await push([good[1], good[0], *good[2:]], WeightsError, "differ from the plan")

    def planted(*, swap: bool):
        fill = pusher._filler.fill

        def filled(tensors):
            for index, bucket, bytes_N in fill(tensors):
                sent = bytes_N.clone()
                if index == 3 and not swap:
                    sent[17] ^= 1
                yield (index ^ 1 if swap and index < 2 else index), bucket, sent

        return filled

    # The digest is of what should have left: what really leaves has one bit changed.
    flip_one_bit(monkeypatch, pusher._transport)
    await push(good, MismatchError, "bucket 3")
    monkeypatch.undo()
    monkeypatch.setattr(pusher._filler, "fill", planted(swap=True))
    await push(good, MismatchError, "bucket 0")
    monkeypatch.undo()
    change(model, 7)
    await asyncio.to_thread(pusher.push, checkpoint_weights(model, folder), "policy@good", "policy@good")
    torch.testing.assert_close(await served(server, "policy@good"), hf_logprobs(model, TOKENS), atol=1e-5, rtol=0)


async def test_a_plan_that_leaves_a_weight_out_or_brings_an_unknown_one_is_refused(merged, folder):
    server, model = merged
    metas = describe(checkpoint_weights(model, folder))
    endpoint = Endpoint(server.root_url, server.api_key)
    renamed = [*metas[:-1], type(metas[-1])("model.layers.99.mlp.gate.weight", *list(vars(metas[-1]).values())[1:])]
    wrong_shape = [*metas[:-1], type(metas[-1])(metas[-1].name, metas[-1].dtype, (*metas[-1].shape, 1))]
    for planned, match in ((metas[:-1], metas[-1].name), (renamed, r"layers\.99"), (wrong_shape, metas[-1].name)):
        pusher = WeightPusher(endpoint, GlooSender(60.0), make_plan(planned), deadline_s=100.0)
        with pytest.raises(WeightsError, match=match):
            await asyncio.to_thread(pusher.connect)
        pusher.close()


async def test_a_sender_that_stalls_is_given_up_at_the_deadline(merged, folder):
    """The server says what it waited for, serves the old version, and takes the next sender."""
    server, model = merged
    (name,) = await server.models()
    before = await served(server, name)
    good = checkpoint_weights(model, folder)
    plan = make_plan(describe(good), bucket_bytes=40_000)
    endpoint = Endpoint(server.root_url, server.api_key)
    pusher = WeightPusher(endpoint, GlooSender(3.0), plan, deadline_s=100.0)
    await asyncio.to_thread(pusher.connect)
    await asyncio.to_thread(
        pusher._control.call, "POST", "/lockstep/sync/receive", {"plan": pusher._described["id"], "version": "x"}
    )
    body = {"version": "x", "digests": [[]], "served_name": None, "deadline_s": 1.0}
    with pytest.raises(ServerError, match=plan.buckets[0].slots[0].meta.name):
        await asyncio.to_thread(pusher._control.call, "POST", "/lockstep/sync/commit", body)
    await asyncio.to_thread(pusher._abort)
    assert torch.equal(await served(server, name), before)
    pusher.close()
    again = WeightPusher(endpoint, GlooSender(60.0), plan, deadline_s=100.0)
    await asyncio.to_thread(again.push, good, "policy@again", name)
    torch.testing.assert_close(await served(server, name), hf_logprobs(model, TOKENS), atol=1e-5, rtol=0)
    again.close()
