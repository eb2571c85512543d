"""TrainableModel: names, versions, and leases that keep a running rollout on one version."""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI

from lockstep.backends.base import Endpoint
from lockstep.config.lora import LoraConfig
from lockstep.errors import ConfigError, RolloutError
from lockstep.model import TrainableModel
from lockstep.rollouts.gather import gather_trajectory_groups
from lockstep.rollouts.leases import rollout_scope
from random_batches import choice, trajectory


class Desk:
    """The smallest backend: it serves whatever it is given."""

    def __init__(self, step: int = 0, url: str = "http://127.0.0.1:9/v1"):
        self.step, self.url = step, url

    async def register(self, model):
        return self.step

    def endpoint(self, model):
        return Endpoint(base_url=self.url, api_key="secret")

    async def train(self, model, groups, config=None):
        raise NotImplementedError

    async def close(self):
        return None


def make(**changes) -> TrainableModel:
    return TrainableModel(**({"name": "m", "project": "p", "base_model": "b"} | changes))


@pytest.mark.parametrize("bad", ["", "a/b", "a@3", "..", ".hidden", "a b", "ä", "x" * 129, "a\n"])
def test_names_must_be_a_folder_and_a_model_id(bad):
    for field in ("name", "project"):
        with pytest.raises(ConfigError, match="can't be a folder and a model id"):
            make(**{field: bad})


def test_lora_is_the_default_and_can_be_turned_off():
    assert make().lora == LoraConfig()
    assert make(lora=None).lora is None


async def test_nothing_works_before_register():
    model = make()
    for use in (lambda: model.step, model.inference_name, model.openai_client):
        with pytest.raises(ConfigError, match="not registered"):
            use()


async def test_register_takes_the_backends_step():
    model, desk = make(), Desk(step=5)
    await model.register(desk)
    assert (model.step, model.inference_name(), model.inference_name(2)) == (5, "m@5", "m@2")
    model._advance(6)
    assert model.inference_name() == "m@6"
    with pytest.raises(ValueError, match="can't go to 6"):
        model._advance(6)
    with pytest.raises(ConfigError, match="another backend"):
        await model.register(Desk())


async def test_client_is_plain_and_follows_the_endpoint():
    model, desk = make(), Desk()
    await model.register(desk)
    client = model.openai_client()
    assert isinstance(client, AsyncOpenAI)
    assert (str(client.base_url), client.api_key) == ("http://127.0.0.1:9/v1/", "secret")
    assert model.openai_client() is client
    desk.url = "http://127.0.0.1:10/v1"
    assert str(model.openai_client().base_url) == "http://127.0.0.1:10/v1/"
    assert "secret" not in repr(desk.endpoint(model)) + repr(model)


async def test_a_rollout_stays_on_the_version_it_began_with():
    model = make()
    await model.register(Desk())
    asked, halfway, go_on = [], asyncio.Event(), asyncio.Event()

    async def rollout():
        asked.append(model.inference_name())
        halfway.set()
        await go_on.wait()
        asked.append(model.inference_name())
        asked.append(await asyncio.create_task(helper()))  # tasks of the rollout share its version
        return trajectory(choice([1], [2]))

    async def helper():
        return model.inference_name()

    async def train():
        await halfway.wait()
        assert model.leased_steps() == {0}
        model._advance(1)
        assert model.inference_name() == "m@1"  # outside of a rollout: the newest
        go_on.set()

    await asyncio.gather(gather_trajectory_groups([[rollout()]], progress=False), train())
    assert asked == ["m@0", "m@0", "m@0"]
    assert model.leased_steps() == frozenset()


async def test_leases_end_when_a_rollout_fails_or_is_cancelled():
    model = make()
    await model.register(Desk(step=3))

    async def slow():
        model.inference_name()
        await asyncio.sleep(60)

    async def failing():
        model.inference_name()
        await asyncio.sleep(0.01)
        assert model.leased_steps() == {3}
        raise ValueError("x")

    with pytest.raises(RolloutError):
        await gather_trajectory_groups([[slow(), failing()]], progress=False)
    assert model.leased_steps() == frozenset()


async def test_an_explicit_step_is_leased_but_does_not_pin():
    model = make()
    await model.register(Desk(step=3))
    with rollout_scope():
        assert model.inference_name(1) == "m@1"
        assert model.inference_name() == "m@3"
        model._advance(4)
        assert model.inference_name() == "m@3"
        assert model.leased_steps() == {1, 3}
    assert model.leased_steps() == frozenset()


async def test_scopes_of_two_models_and_two_rollouts_are_apart():
    first, other = make(name="one"), make(name="other")
    await first.register(Desk())
    await other.register(Desk(step=7))
    with rollout_scope():
        assert (first.inference_name(), other.inference_name()) == ("one@0", "other@7")

        async def second():
            return first.inference_name()

        first._advance(1)
        assert await asyncio.create_task(second()) == "one@0"
    assert first.inference_name() == "one@1"


async def test_a_task_left_over_by_a_rollout_is_not_pinned():
    model = make()
    await model.register(Desk())
    ended = asyncio.Event()

    async def leftover():
        await ended.wait()
        return model.inference_name()

    with rollout_scope():
        model.inference_name()
        task = asyncio.create_task(leftover())
        await asyncio.sleep(0)
    model._advance(1)
    ended.set()
    assert await task == "m@1"
    assert model.leased_steps() == frozenset()
