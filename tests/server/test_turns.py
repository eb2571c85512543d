"""A real server that sleeps and wakes, answers to older names, scores for several at once, takes siblings,
and keeps a request's noise."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re

import pytest
import torch

import lockstep as ls
from lockstep.backends.base import Endpoint
from lockstep.errors import RolloutError, ServerError
from lockstep.model import open_client
from lockstep.testing.in_flight import seen_running

pytestmark = pytest.mark.server
TOKENS = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(4)).tolist()


async def generated(server, tokens: int) -> int:
    body = {"model": "base", "prompt": TOKENS, "max_tokens": tokens, "ignore_eos": True}
    reply = (await server.call("POST", "/v1/completions", body)).json()
    return len(reply["choices"][0]["token_ids"])


async def test_requests_in_flight_end_first_and_new_ones_wait(server):
    before = await server.score("base", TOKENS)
    running = await seen_running(server, lambda: generated(server, 300))
    await server.sleep(1, deadline_s=100.0)
    assert await asyncio.wait_for(running, 5.0) == 300  # it was let finish, not cut off
    assert await server.version() == {"version": "base", "names": ["base"], "asleep": ["kv_cache", "weights"]}
    waiting = asyncio.create_task(server.score("base", TOKENS))
    with pytest.raises(ServerError, match="asleep already"):
        await server.sleep(2, deadline_s=1.0)
    await server.wake("weights")
    assert (await server.version())["asleep"] == ["kv_cache"]
    done, _ = await asyncio.wait([waiting], timeout=0.5)
    assert not done  # half awake is not awake
    await server.wake()
    assert await waiting == before
    await server.wake()  # harmless
    assert (await server.version())["asleep"] == []
    with pytest.raises(ServerError, match="should be 1 or 2"):
        await server.sleep(3, deadline_s=1.0)
    assert all(worker["resident"] > 0 for worker in await server.memory())


async def test_older_names_are_answered_as_long_as_they_are_kept(server):
    expected = await server.score("base", TOKENS)
    await server.keep_names(["base", "older"])
    await server.rename("newer")
    assert await server.models() == ["newer", "base", "older"]
    for name in ("newer", "base", "older"):
        assert await server.score(name, TOKENS) == expected
    reply = (await server.call("POST", "/v1/completions", {"model": "older", "prompt": TOKENS, "max_tokens": 2})).json()
    assert reply["model"] == "newer"
    await server.keep_names([])
    assert await server.models() == ["newer"]
    with pytest.raises(ServerError, match="older"):
        await server.score("older", TOKENS)
    await server.rename("base")
    assert await server.models() == ["base"]


async def test_scores_asked_for_at_once_are_those_asked_for_alone(server):
    """Prompts of several lengths in one batch, beside a generation."""
    prompts = [TOKENS[:length] for length in (2, 17, 33, 60)]
    alone = [await server.score("base", prompt) for prompt in prompts]
    together = await asyncio.gather(generated(server, 40), *(server.score("base", prompt) for prompt in prompts * 3))
    for scores, expected in zip(together[1:], alone * 3, strict=True):
        assert scores == pytest.approx(expected, abs=1e-5)


async def test_a_seeded_prompt_in_pieces_samples_as_a_whole_one(server):
    """Sixteen prompts of 300 tokens are more than one step computes: some are computed in pieces."""

    async def sampled(number: int) -> list[int]:
        body = {"model": "base", "prompt": [3 + number, *TOKENS * 5][:300], "max_tokens": 4, "seed": number}
        reply = await server.call("POST", "/v1/completions", body | {"ignore_eos": True, "cache_salt": str(number)})
        return reply.json()["choices"][0]["token_ids"]

    together = await asyncio.gather(*map(sampled, range(16)))
    assert together == [await sampled(number) for number in range(16)]


async def test_a_whole_reply_is_its_stream(server):
    """The engine sends whole replies in parts of many tokens, and streams token by token."""
    messages = [{"role": "user", "content": "Say yes."}]
    async with open_client(Endpoint(server.base_url, server.api_key, 8, 512)) as client:

        async def both(tokens: int) -> None:
            ask = functools.partial(
                client.chat.completions.create, model="base", messages=messages, max_tokens=tokens, seed=tokens,
                logprobs=True, top_logprobs=tokens % 3, extra_body={"ignore_eos": True},
            )  # fmt: skip
            reply, stream = await ask(), await ask(stream=True)
            chunks = [choice async for chunk in stream for choice in chunk.choices]
            choice = reply.choices[0]
            streamed = [token for chunk in chunks for token in chunk.model_extra.get("token_ids") or []]
            assert streamed == choice.model_extra["token_ids"]
            assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
            contents = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
            assert contents == choice.logprobs.content
            assert len(contents) == tokens

        await asyncio.gather(*map(both, (1, 2, 31, 33, 34, 100)))


async def test_siblings_get_the_replies_they_would_get_alone(server, monkeypatch):
    """Text, ids, log-probabilities, versions, digests and usage, with and without OpenAI's log-probabilities."""
    endpoint = Endpoint(server.base_url, server.api_key, 8, 512)
    replies: dict[tuple[int, bool], dict] = {}

    async def rollout(client, seed: int, logprobs: bool) -> ls.Trajectory:
        messages = [{"role": "user", "content": "Say yes."}]
        reply = await client.chat.completions.create(
            model="base", messages=messages, seed=seed, logprobs=logprobs, max_tokens=4 + seed, temperature=0.9
        )
        replies[seed, logprobs] = reply.model_dump(exclude={"id", "created"})
        return ls.Trajectory(messages_and_choices=[*messages, reply.choices[0]], reward=0.0)

    async def gathered(client, seeds: list[int], logprobs: bool) -> None:
        await ls.gather_trajectory_groups([[rollout(client, s, logprobs) for s in seeds]], progress=False)

    def same_limit(client):
        create = client.chat.completions.create
        monkeypatch.setattr(client.chat.completions, "create", lambda **asked: create(**{**asked, "max_tokens": 9}))

    async def posts() -> float:
        """Siblings that the server has taken so far, as it counts requests."""
        metrics = (await server.call("GET", "/metrics")).text
        counts = re.findall(r'http_requests_total{handler="/lockstep/siblings".*status="2xx"} (\S+)', metrics)
        return sum(map(float, counts))

    for logprobs in (False, True):
        async with open_client(endpoint) as alone:
            same_limit(alone)
            await gathered(alone, [1, 2, 3], logprobs)
        expected, before = dict(replies), await posts()
        async with open_client(dataclasses.replace(endpoint, siblings=True)) as together:
            same_limit(together)
            await gathered(together, [1, 2, 3], logprobs)
        assert replies == expected
        assert await posts() == before + 1
    assert len({str(reply["choices"][0]["token_ids"]) for reply in replies.values()}) > 1


async def test_siblings_are_refused_as_each_alone_is(server):
    endpoint = Endpoint(server.base_url, server.api_key, 8, 512, siblings=True)

    async def rollout(client, **wrong) -> ls.Trajectory:
        messages = [{"role": "user", "content": "x"}]
        await client.chat.completions.create(**{"model": "base", "messages": messages} | wrong)
        return ls.Trajectory(messages_and_choices=messages, reward=0.0)

    async with open_client(endpoint) as client:
        for wrong, message in (({"model": "other"}, "does not exist"), ({"max_tokens": -1}, "max_tokens")):
            with pytest.raises(RolloutError, match=message):
                await ls.gather_trajectory_groups([[rollout(client, **wrong) for _ in range(2)]], progress=False)
    for body in ({"request": {"model": "base", "messages": [], "n": 2}, "seeds": [1]}, {"request": {}, "seeds": []}):
        with pytest.raises(ServerError, match="refused POST /lockstep/siblings"):
            await server.call("POST", "/lockstep/siblings", body)
    assert (await server.call("GET", "/lockstep/status")).json()["in_flight"] == {}
