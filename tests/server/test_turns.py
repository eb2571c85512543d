"""A real server that sleeps and wakes, answers to older names, scores for several at once,
and keeps a request's noise."""

from __future__ import annotations

import asyncio

import pytest
import torch

from lockstep.errors import ServerError
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
    for found, expected in zip(together[1:], alone * 3, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


async def test_a_seeded_prompt_in_pieces_samples_as_a_whole_one(server):
    """Sixteen prompts of 300 tokens are more than one step computes: some are computed in pieces."""

    async def sampled(number: int) -> list[int]:
        body = {"model": "base", "prompt": [3 + number, *TOKENS * 5][:300], "max_tokens": 4, "seed": number}
        reply = await server.call("POST", "/v1/completions", body | {"ignore_eos": True, "cache_salt": str(number)})
        return reply.json()["choices"][0]["token_ids"]

    together = await asyncio.gather(*map(sampled, range(16)))
    assert together == [await sampled(number) for number in range(16)]
