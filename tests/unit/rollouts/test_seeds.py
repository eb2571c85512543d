"""Each request of a rollout has a seed that follows from its place in the run (audit H1)."""

from __future__ import annotations

import asyncio

import pytest

import lockstep as ls
from fake_server import COMPLETION, FakeServer
from lockstep.backends.base import Endpoint
from lockstep.model import open_client
from random_batches import trajectory


class Recording(FakeServer):
    """Keeps the bodies of its requests, and fails the first `failures` of them."""

    def __init__(self, failures: int = 0):
        self.failures = failures
        self.bodies: list[dict] = []

    async def answer(self, path, body):
        self.bodies.append(body)
        return 500 if len(self.bodies) <= self.failures else 200, COMPLETION


class Backend:
    """A backend whose server is a `Recording`."""

    def __init__(self, url: str, seed: int | None = 7, step: int = 0):
        self.url, self.seed, self.step = url, seed, step

    async def register(self, model):
        return self.step

    def endpoint(self, model):
        return Endpoint(self.url, "key", 8, 512, self.seed)


async def registered(server: Recording, **changes) -> ls.TrainableModel:
    model = ls.TrainableModel(name="m", project="p", base_model="b")
    await model.register(Backend(server.base_url, **changes))
    return model


async def ask(model, prompt="x", **settings):
    await model.openai_client().completions.create(model=model.inference_name(), prompt=prompt, **settings)


async def two_requests(model, name, wait_s=0.0):
    for turn in range(2):
        await ask(model, f"{name}.{turn}")
        await asyncio.sleep(wait_s)
    return trajectory()


async def gather(model, noise=None, waits=(0.0, 0.0)):
    rollouts = [[two_requests(model, f"{group}{i}", waits[i]) for i in range(2)] for group in range(2)]
    await ls.gather_trajectory_groups(rollouts, progress=False, noise=noise)


def seeds(server: Recording) -> dict[str, int]:
    """By prompt; the requests are forgotten."""
    bodies, server.bodies = server.bodies, []
    assert bodies
    return {body["prompt"]: body.get("seed") for body in bodies}


async def test_h1_each_request_of_a_rollout_has_a_seed_of_its_own_whatever_the_order():
    async with Recording() as server:
        model = await registered(server)
        await gather(model)
        first = seeds(server)
        assert len(set(first.values())) == len(first) == 8
        assert all(0 <= seed < 2**48 for seed in first.values())
        await gather(model, waits=(0.02, 0.0))
        assert not set(seeds(server).values()) & set(first.values())  # the second gather of a step has other noise
        again = await registered(server)
        await gather(again, waits=(0.02, 0.0))
        assert seeds(server) == first
        for other in (await registered(server, seed=8), await registered(server, step=1)):
            await gather(other)
            assert not set(seeds(server).values()) & set(first.values())


async def test_h1_gathers_of_one_name_have_the_same_noise():
    async with Recording() as server:
        model = await registered(server)
        await gather(model, noise="training")
        first = seeds(server)
        await gather(model, noise="training")
        assert seeds(server) == first
        await gather(model, noise="evaluation")
        assert not set(seeds(server).values()) & set(first.values())


async def test_h1_a_gather_inside_a_rollout_has_places_below_it():
    async def outer(model, number):
        await ls.gather_trajectory_groups(
            [[two_requests(model, f"{number}{i}", 0.01 * ((i + number) % 2)) for i in range(2)]], progress=False
        )
        return trajectory()

    places = []
    async with Recording() as server:
        for _ in range(2):
            model = await registered(server)
            await ls.gather_trajectory_groups([[outer(model, number) for number in range(2)]], progress=False)
            places.append(seeds(server))
    assert places[0] == places[1]
    assert len(set(places[0].values())) == 8


async def test_h1_a_retry_keeps_its_seed_and_a_users_seed_stays():
    async def rollout(model):
        await ask(model)
        await ask(model, seed=3)
        await ask(model, extra_body={"seed": 4})
        return trajectory()

    async with Recording(failures=2) as server:
        model = await registered(server)
        await ls.gather_trajectory_groups([[rollout(model)]], progress=False)
        sent = [body["seed"] for body in server.bodies]
    assert len(sent) == 5
    assert len(set(sent[:3])) == 1
    assert sent[0] not in (3, 4)
    assert sent[3:] == [3, 4]


async def test_h1_no_seed_outside_of_rollouts_or_where_it_is_switched_off():
    async with Recording() as server:
        model = await registered(server)
        await ask(model)
        assert set(seeds(server).values()) == {None}
        unseeded = await registered(server, seed=None)
        await gather(unseeded)
        assert set(seeds(server).values()) == {None}


@pytest.mark.server
async def test_h1_a_seed_decides_the_answer_whatever_shares_the_batch(server):
    """The real server: tokens and bits of the log-probabilities, alone, in a crowd, and in the other order."""
    body = {"model": "base", "prompt": [5, 6, 7, 8], "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    async with open_client(Endpoint(server.base_url, server.api_key, 16, 512)) as client:

        async def answers(numbers):
            replies = await asyncio.gather(*(client.completions.create(**body, seed=10**9 * n) for n in numbers))
            choices = [reply.choices[0] for reply in replies]
            return {n: (c.token_ids, c.sampled_logprobs) for n, c in zip(numbers, choices, strict=True)}

        crowd = await answers(range(8))
        assert await answers(range(7, -1, -1)) == crowd
        assert (await answers([3]))[3] == crowd[3]
        assert len({tuple(tokens) for tokens, _ in crowd.values()}) == 8
        several = (await client.completions.create(**body, seed=5, n=4)).choices
        assert len({tuple(choice.token_ids) for choice in several}) == 4
