"""`model.episode()`: which version answers, what keeps it loaded, and when the key is dead."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import json
import re

import anthropic
import httpx
import openai
import pytest
from openai import AsyncOpenAI, InternalServerError

import lockstep as ls
from lockstep.errors import DataError
from lockstep.gateway.calls import Terms
from lockstep.gateway.server import Gateway
from lockstep.gateway.upstream import Upstream
from lockstep.rollouts.leases import rollout_scope
from lockstep.rollouts.router import Replica, Router


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


async def test_a_connection_that_the_server_closed_meanwhile_is_opened_anew():
    """A server closes idle connections, also in the moment in which a request is sent."""
    seen = []

    async def answered(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head.lower()).group(1))
        await reader.readexactly(length)
        seen.append(length)
        if len(seen) > 1:
            body = json.dumps({"count": len(seen)}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answered, "127.0.0.1", 0)
    async with server:
        upstream = Upstream()
        port = server.sockets[0].getsockname()[1]
        address = ls.Endpoint(f"http://127.0.0.1:{port}/v1", "k")
        assert await upstream.count(address, {"messages": []}) == 2
        upstream.close()


async def test_a_streamed_text_may_have_any_sign_that_ends_a_line_elsewhere():
    said = "a\u2028b\x85c\x1cd\re"
    chunk = json.dumps({"choices": [{"delta": {"content": said}}]}, ensure_ascii=False)
    reply = json.dumps({"lockstep_reply": {"text": said}}, ensure_ascii=False)

    async def answered(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        body = f"data: {chunk}\n\ndata: {reply}\n\ndata: [DONE]\n\n".encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answered, "127.0.0.1", 0)
    async with server:
        upstream, taken = Upstream(), []
        address = ls.Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "k")
        assert await upstream.stream(address, {"messages": []}, taken.append, under_way=True) == {"text": said}
        assert taken[0]["choices"][0]["delta"]["content"] == said
        upstream.close()


async def test_an_episode_is_answered_by_another_server_when_its_own_is_lost():
    """Before anything of a reply came. What had begun to come, and what no other server can give, is an error."""
    reply = {
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "y"},
                "prompt_token_ids": [1],
                "token_ids": [2],
            }
        ],
        "id": "x",
        "created": 0,
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }

    async def answered(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower()).group(1)))
        body = json.dumps(reply).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answered, "127.0.0.1", 0) as server:
        lives = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        serving = [Replica(0, "http://127.0.0.1:9/v1", "k"), Replica(1, lives, "k")]
        router, asked = Router(lambda: serving), []

        def terms(hold):
            def address():
                asked.append(hold.replica().number)
                return ls.Endpoint(lives, "k").served_by(hold.replica())

            return Terms("m@0", address, broke_off=hold.broke_off)

        gateway = Gateway()
        try:
            for _ in range(4):
                hold = router.hold_of_episode(None)
                episode = gateway.episode(terms(hold), hold.end)
                async with AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key, max_retries=0) as client:
                    answer = await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": "x"}]
                    )
                assert answer.choices[0].message.content == "y"
                assert len(episode.trajectory(1.0).choices) == 1
            assert asked.count(0) <= 1  # it rests after its first failure
            del serving[1]
            episode = gateway.episode(terms(router.hold_of_episode(None)), lambda: None)
            async with AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key, max_retries=0) as client:
                with pytest.raises(InternalServerError, match="gave no reply"):
                    await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        finally:
            gateway.close()


async def test_another_model_answers_to_its_names_and_is_not_captured(model):
    """A harness asks a small model for titles. Both clients get that model's reply, as a stream, too."""
    seen: list[dict] = []
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": "A title", "tool_calls": [call]}
    reply = {
        **{"id": "r1", "object": "chat.completion", "created": 1, "model": "small-1"},
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }

    async def answered(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower()).group(1)))
            key = re.search(rb"authorization: bearer (\S+)", head.lower()).group(1)
            seen.append({**json.loads(body), "key": key.decode(), "path": head.split()[1].decode()})
            sent = json.dumps(reply).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(sent) + sent)

    server = await asyncio.start_server(answered, "127.0.0.1", 0)
    other = ls.OtherModel(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1", "small-1", "secret")
    asked = [{"role": "user", "content": "Name this."}]
    async with server:
        episode = model.episode(sampling={"temperature": 1.0}, models={"claude-haiku*": other})
        direct = anthropic.DefaultAsyncHttpxClient(trust_env=False)
        url = episode.base_url.removesuffix("/v1")
        async with anthropic.AsyncAnthropic(base_url=url, api_key=episode.api_key, http_client=direct) as client:
            plain = await client.messages.create(model="claude-haiku-4", max_tokens=9, messages=asked)
            async with client.messages.stream(model="claude-haiku-5", max_tokens=9, messages=asked) as stream:
                streamed = await stream.get_final_message()
        for got in (plain, streamed):
            assert [block.type for block in got.content] == ["text", "tool_use"]
            assert (got.content[0].text, got.content[1].input, got.usage.output_tokens) == ("A title", {"a": 1}, 2)
            assert got.stop_reason == "tool_use"
        client = openai.AsyncOpenAI(
            base_url=episode.base_url,
            api_key=episode.api_key,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )
        chunks = [
            part
            async for part in await client.chat.completions.create(model="claude-haiku", messages=asked, stream=True)
        ]
        assert chunks[0].choices[0].delta.content == "A title"
        assert "secret" not in repr(other)
    assert [(each["model"], each["key"], each["path"]) for each in seen] == [
        ("small-1", "secret", "/api/v1/chat/completions")
    ] * 3
    assert not [each for each in seen if "temperature" in each]  # sampling is the policy's
    assert episode.calls == []
    assert episode._account()["elsewhere"] == {"claude-haiku-4": 1, "claude-haiku-5": 1, "claude-haiku": 1}
    with pytest.raises(DataError, match="the agent called nothing"):
        episode.trajectory(reward=1.0)
