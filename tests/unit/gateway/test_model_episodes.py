"""`model.episode()`: which version answers, what keeps it loaded, and when the key is dead."""

from __future__ import annotations

import httpx
import pytest

import lockstep as ls
from lockstep.errors import DataError
from lockstep.rollouts.leases import rollout_scope


class Served:
    """As much of a backend as an episode asks."""

    async def register(self, model) -> int:
        return 3

    def endpoint(self, model):
        return ls.Endpoint("http://127.0.0.1:9/v1", "nobody")


@pytest.fixture
async def model():
    model = ls.TrainableModel(name="agent", project="p", base_model="b")
    await model.register(Served())
    yield model
    await model._released()


def opens(episode) -> bool:
    headers = {"Authorization": f"Bearer {episode.api_key}"}
    return httpx.get(f"{episode.base_url}/models", headers=headers, trust_env=False).status_code == 200


async def test_an_episode_keeps_its_version_loaded_until_it_ends(model):
    episode = model.episode()
    model._advance(4)
    assert episode.model == "agent@3"
    assert model.leased_steps() == {3}
    assert opens(episode)
    episode.end()
    episode.end()
    assert not opens(episode)
    assert model.leased_steps() == set()
    assert model.episode().model == "agent@4"


async def test_an_episode_ends_with_its_rollout(model):
    with rollout_scope():
        name = model.inference_name()
        model._advance(4)
        episode = model.episode()
        assert episode.model == name == "agent@3"
        assert opens(episode)
    assert not opens(episode)
    assert model.leased_steps() == set()


async def test_a_server_that_is_gone_is_named_and_nothing_is_captured(model):
    with model.episode() as episode:
        url, key = episode.base_url, {"x-api-key": episode.api_key}
        body = {"model": "m", "messages": [{"role": "user", "content": "Go."}]}
        reply = httpx.post(f"{url}/chat/completions", json=body, headers=key, trust_env=False)
        assert reply.status_code == 502
        assert "the run's server gave no reply" in reply.json()["error"]["message"]
        with pytest.raises(DataError, match="no reward"):
            episode.trajectory()
        with pytest.raises(DataError, match="the agent called nothing"):
            episode.trajectory(reward=1.0)
