"""What is in flight is what the server holds, and a deadline counts from when the server took the request (audit C2)."""

from __future__ import annotations

import asyncio

import pytest

import lockstep as ls
from fake_server import COMPLETION, FakeServer
from lockstep import model as model_module
from lockstep.backends.base import Endpoint
from lockstep.config import deadlines
from lockstep.model import open_client
from lockstep.rollouts.leases import rollout_scope
from lockstep.rollouts.slots import Slots


class Queueing(FakeServer):
    """Works as vLLM does at its limit: it takes every request and serves `places` of them at once."""

    def __init__(self, places: int, seconds: float):
        self._places, self._seconds = asyncio.Semaphore(places), seconds
        self.requests = self.inside = self.most = 0
        self.order: list[str] = []

    async def answer(self, path, body):
        self.requests += 1
        self.order.append(body["prompt"])
        self.inside += body.get("n") or 1
        self.most = max(self.most, self.inside)
        async with self._places:
            await asyncio.sleep(self._seconds)
        self.inside -= body.get("n") or 1
        return 200, COMPLETION


async def ask(client, prompt="p", **fields):
    return await client.completions.create(model="m", prompt=prompt, **fields)


async def rollout(client):
    await ask(client, max_tokens=1)
    return ls.Trajectory(messages_and_choices=[{"role": "user", "content": "x"}], reward=0.0)


@pytest.mark.parametrize("slots", [4, None])
async def test_c2_nothing_is_lost_to_repeats(monkeypatch, slots):
    """64 rollouts on 4 places of 0.1 s, a deadline of 0.8 s (and one for the token): 1.6 s in all. Without slots they begin again."""
    monkeypatch.setattr(deadlines, "REQUEST_S", 0.8)
    async with Queueing(4, 0.1 if slots else 0.2) as server:
        async with open_client(Endpoint(server.base_url, "key", slots, 512)) as client:
            gathering = ls.gather_trajectory_groups(
                [[rollout(client) for _ in range(8)] for _ in range(8)], progress=False
            )
            groups = await gathering
        assert sum(len(group.trajectories) for group in groups) == 64
        if slots:
            assert server.requests == 64
            assert server.most == 4
        else:
            assert server.requests > 64
            assert server.most > 4


async def test_choices_take_a_place_each_and_a_failed_or_cancelled_request_gives_its_places_back():
    async with Queueing(8, 0.05) as server, open_client(Endpoint(server.base_url, "key", 4, 512)) as client:
        await asyncio.gather(*(ask(client, n=3) for _ in range(3)), *(ask(client) for _ in range(5)))
        assert server.most <= 4
        waiting = [asyncio.ensure_future(ask(client, n=9)) for _ in range(3)]
        await asyncio.sleep(0.02)
        for request in waiting:
            request.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.wait_for(ask(client, n=4), 5)


async def test_rollouts_under_way_go_first():
    async with Queueing(1, 0.05) as server, open_client(Endpoint(server.base_url, "key", 1, 512)) as client:

        async def turns(name):
            with rollout_scope():
                for turn in range(2):
                    await ask(client, prompt=f"{name}{turn}")

        await asyncio.gather(*(turns(name) for name in "abc"))
    assert server.order == ["a0", "a1", "b0", "b1", "c0", "c1"] or server.order[:3] == ["a0", "b0", "a1"]


async def test_a_deadline_grows_with_the_tokens_and_the_users_own_stays(monkeypatch):
    monkeypatch.setattr(deadlines, "REQUEST_S", 0.1)
    monkeypatch.setattr(model_module, "_RETRIES", 0)
    from openai import APITimeoutError

    async with Queueing(1, 0.6) as server, open_client(Endpoint(server.base_url, "key", 1, 512)) as client:
        await ask(client, max_tokens=1)
        await ask(client)
        with pytest.raises(APITimeoutError):
            await ask(client, max_tokens=1, timeout=0.2)


async def test_places_go_to_whoever_fits_first_in_line():
    slots = Slots(2)
    assert await slots.take(5, under_way=False) == 2
    late = asyncio.ensure_future(slots.take(1, under_way=False))
    early = asyncio.ensure_future(slots.take(2, under_way=True))
    await asyncio.sleep(0)
    slots.give_back(2)
    await asyncio.wait_for(early, 1)
    assert not late.done()
    slots.give_back(2)
    assert await asyncio.wait_for(late, 1) == 1


@pytest.mark.server
async def test_a_real_server_never_holds_more(server):
    most = 0
    async with open_client(Endpoint(server.base_url, server.api_key, 3, 512)) as client:
        body = {"model": "base", "prompt": [5, 6, 7, 8], "max_tokens": 24, "extra_body": {"ignore_eos": True}}
        running = [asyncio.ensure_future(client.completions.create(**body)) for _ in range(20)]
        while not all(task.done() for task in running):
            most = max(most, sum((await server.in_flight()).values()))
            await asyncio.sleep(0.005)
        replies = await asyncio.gather(*running)
    assert len(replies) == 20
    assert 0 < most <= 3
