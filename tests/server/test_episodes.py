"""Episodes on a real server: official clients in front, training sequences behind."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tomllib
from collections import Counter

import numpy as np
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI, AuthenticationError, BadRequestError

import coding_session
from lockstep.backends.base import Endpoint
from lockstep.batching.tokenize import tokenize
from lockstep.cli.quickstart.examples import examples_folder
from lockstep.errors import ConfigError, DataError
from lockstep.gateway import app, upstream
from lockstep.gateway.calls import Terms
from lockstep.gateway.server import Gateway
from lockstep.loop.environments.find import task_of
from lockstep.loop.run_file import TaskSection
from lockstep.loop.task import load_task
from rendering import template_of

pytestmark = pytest.mark.server
ALL_TOKENS = {"ignore_eos": True}
"""A model with random weights ends a reply at any token."""
QUESTION = {"role": "user", "content": "Say yes, no or maybe."}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # the clients are built as a user builds them


@pytest.fixture(scope="module")
async def agent_server(runtime, tiny_qwen3, tmp_path_factory):
    """The tiny Qwen3 with Qwen3's own template, which drops thinking, as `agent@0`."""
    from lockstep.inference.launch import ServerConfig, launch

    template = tmp_path_factory.mktemp("template") / "thinking.jinja"
    template.write_text(template_of("qwen3"))
    config = ServerConfig(
        model=tiny_qwen3,
        served_name="agent@0",
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=16,
        threads=1,
        tool_call_parser="hermes",
        extra_args=("--chat-template", str(template)),
    )
    server = await launch(config, runtime, tmp_path_factory.mktemp("run"))
    yield server
    await server.close()


@pytest.fixture(scope="module")
def gateway(agent_server):
    gateway = Gateway()
    yield gateway
    gateway.close()


@pytest.fixture
def episode(gateway, agent_server):
    with new_episode(gateway, agent_server) as episode:
        yield episode


def new_episode(gateway, server, seed=None):
    endpoint = Endpoint(server.base_url, server.api_key, slots=16, max_model_len=2048)
    return gateway.episode(Terms("agent@0", lambda: endpoint, seed=seed), lambda: None)


def openai_client(episode, **options) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key, **options)


def anthropic_client(episode) -> AsyncAnthropic:
    url = episode.environment()["ANTHROPIC_BASE_URL"]
    return AsyncAnthropic(base_url=url, api_key=episode.api_key)


def sequences(episode):
    return tokenize(episode.trajectory(reward=1.0), "agent", 0, 0)


async def test_a_tool_agent_that_drops_thinking_gives_one_sequence(gateway, agent_server):
    """Ten turns. The prompt is counted once: tokens in sequences are those of the longest conversation."""
    episode = new_episode(gateway, agent_server)
    messages = [{"role": "system", "content": "Be brief."}, QUESTION]
    async with openai_client(episode) as client:
        for turn in range(10):
            reply = await client.chat.completions.create(
                model="gpt-9", messages=messages, tools=TOOLS, max_tokens=6, seed=turn, temperature=1.0
            )
            assert reply.model == "gpt-9"
            assert not {"prompt_token_ids", "token_ids", "weight_versions"} & set(reply.choices[0].model_extra or {})
            text = f"  {(reply.choices[0].message.content or '').strip()}\n"
            messages = [*messages, {"role": "assistant", "content": text, "tool_calls": None, "audio": None}]
            messages.append({"role": "user", "content": f"and {turn}?"} if turn % 2 else {**QUESTION, "name": None})
    trajectory = episode.trajectory(reward=1.0)
    made = tokenize(trajectory, "agent", 0, 0)
    assert made.splits == 0
    assert len(made.replies) == 10
    (sequence,) = made.sequences
    assert sequence.loss_mask_S.sum() == sum(made.replies)
    last = trajectory.choices[-1].model_extra
    assert len(sequence.tokens_S) == len(last["prompt_token_ids"]) + len(last["token_ids"])
    assert trajectory.metadata["episode"] == {"calls": 10, "unanswered": 0, "forks": {}, "model_names": {"gpt-9": 10}}


async def chat_text(episode, stream) -> str:
    options = {"model": "any", "messages": [QUESTION], "max_tokens": 12, "n": 2, "extra_body": ALL_TOKENS}
    async with openai_client(episode) as client:
        if not stream:
            reply = await client.chat.completions.create(**options)
            return "".join(choice.message.content for choice in reply.choices)
        parts, usage, pieces = {0: "", 1: ""}, None, 0
        chunks = await client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        async for chunk in chunks:
            usage = chunk.usage
            assert not {"prompt_token_ids", "lockstep_reply"} & set(chunk.model_extra or {})
            for choice in chunk.choices:
                assert "token_ids" not in (choice.model_extra or {})
                parts[choice.index] += choice.delta.content or ""
                pieces += bool(choice.delta.content)
        assert usage.completion_tokens == 24
        assert pieces > 4  # as they come, not at the end
        return "".join(parts.values())


async def messages_text(episode, stream) -> str:
    options = {"model": "any", "messages": [QUESTION], "max_tokens": 12, "extra_body": ALL_TOKENS}
    async with anthropic_client(episode) as client:
        if not stream:
            reply = await client.messages.create(**options)
            return "".join(block.text for block in reply.content if block.type == "text")
        async with client.messages.stream(**options) as events:
            parts = [part async for part in events.text_stream]
            reply = await events.get_final_message()
        assert (reply.usage.output_tokens, reply.stop_reason) == (12, "max_tokens")
        assert len(parts) > 2
        return "".join(parts)


async def responses_text(episode, stream) -> str:
    options = {"model": "any", "input": [QUESTION], "max_output_tokens": 12, "extra_body": ALL_TOKENS}
    async with openai_client(episode) as client:
        if not stream:
            return (await client.responses.create(**options)).output_text
        async with client.responses.stream(**options) as events:
            seen = [event async for event in events]
        parts = [event.delta for event in seen if event.type == "response.output_text.delta"]
        reply = seen[-1].response
        assert seen[-1].type == "response.incomplete"
        assert reply.output_text == "".join(parts)
        assert len(parts) > 2
        return reply.output_text


@pytest.mark.parametrize("text", [chat_text, messages_text, responses_text])
async def test_streamed_ids_equal_unstreamed_ids(gateway, agent_server, text, monkeypatch):
    monkeypatch.setattr(upstream, "PACE_S", 0.0)
    sampled, texts = [], []
    for stream in (False, True):
        episode = new_episode(gateway, agent_server, seed=5)
        texts.append(await text(episode, stream))
        choices = episode.trajectory(reward=0.0).choices
        sampled.append([(choice.model_extra["token_ids"], choice.model_extra["sampling"]) for choice in choices])
        assert {len(choice.model_extra["sampled_logprobs"]) for choice in choices} == {12}
        tokenize(episode.trajectory(reward=0.0), "agent", 0, 0)
    assert sampled[0] == sampled[1]
    assert [len(ids) for ids, _ in sampled[0]] == [12] * len(sampled[0])
    assert texts[0] == texts[1]


async def test_a_refused_stream_has_its_status(gateway, agent_server):
    episode = new_episode(gateway, agent_server)
    async with openai_client(episode, max_retries=0) as client:
        with pytest.raises(BadRequestError, match="maximum context length"):
            await client.chat.completions.create(model="m", messages=[{**QUESTION, "content": "x" * 4000}], stream=True)


async def test_anthropic_messages_streamed_and_not_continue_one_conversation(gateway, agent_server):
    episode = new_episode(gateway, agent_server)
    asked = {"model": "claude-x", "system": "Be brief.", "max_tokens": 8}
    tools = [{"name": "look", "description": "", "input_schema": {"type": "object", "properties": {}}}]
    async with anthropic_client(episode) as client:
        messages = [QUESTION]
        counted = await client.messages.count_tokens(
            model="claude-x", system="Be brief.", messages=messages, tools=tools
        )
        first = await client.messages.create(**asked, messages=messages, tools=tools)
        assert first.usage.input_tokens == counted.input_tokens
        assert (first.stop_reason == "max_tokens", first.model) == (first.usage.output_tokens == 8, "claude-x")
        messages += [{"role": "assistant", "content": [block.model_dump() for block in first.content]}, QUESTION]
        async with client.messages.stream(**asked, messages=messages, tools=tools) as stream:
            text = "".join([part async for part in stream.text_stream])
            second = await stream.get_final_message()
        assert "".join(block.text for block in second.content if block.type == "text") == text
    made = sequences(episode)
    assert (made.splits, made.replies) == (0, (first.usage.output_tokens, second.usage.output_tokens))


async def test_responses_streamed_and_not_continue_one_conversation(gateway, agent_server):
    episode = new_episode(gateway, agent_server)
    tools = [{"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": True}]
    asked = {"model": "gpt", "instructions": "Be brief.", "max_output_tokens": 8, "tools": tools}
    async with openai_client(episode) as client:
        items = [QUESTION]
        first = await client.responses.create(**asked, input=items)
        assert (first.status == "incomplete", first.model) == (first.usage.output_tokens == 8, "gpt")
        items += [*(item.model_dump() for item in first.output), QUESTION]
        async with client.responses.stream(**asked, input=items) as stream:
            events = [event async for event in stream]
        assert events[0].type == "response.created"
        second = events[-1].response
        assert events[-1].type == f"response.{second.status}"
        assert "".join(part.delta for part in events if part.type == "response.output_text.delta") == second.output_text
        with pytest.raises(BadRequestError, match="previous_response_id needs replies that are stored"):
            await client.responses.create(**asked, input="On.", previous_response_id=second.id)
    made = sequences(episode)
    assert (made.splits, made.replies) == (0, (first.usage.output_tokens, second.usage.output_tokens))


async def test_compaction_and_a_sub_agent_give_their_leaves(gateway, agent_server):
    episode = new_episode(gateway, agent_server)
    system = {"role": "system", "content": "Be brief."}

    async with openai_client(episode) as client:

        async def ask(*messages) -> dict:
            reply = await client.chat.completions.create(model="m", messages=list(messages), max_tokens=4)
            return {"role": "assistant", "content": reply.choices[0].message.content}

        first = await ask(system, QUESTION)
        await ask({"role": "system", "content": "You search."}, QUESTION)
        second = await ask(system, QUESTION, first, QUESTION)
        summary = {"role": "user", "content": "Summary: nothing yet."}
        third = await ask(system, summary)
        await ask(system, summary, third, QUESTION)
        assert second
    forks = dict(episode.forks)
    assert [call.continues for call in episode.calls] == [None, None, 0, None, 3]

    def leaves(calls) -> list[float]:
        continued = {call.continues for call in calls}
        return [float(call.number not in continued) for call in calls]

    trajectory = episode.trajectory(rewards=leaves)
    assert (trajectory.turn_rewards, trajectory.reward) == ([0.0, 1.0, 1.0, 0.0, 1.0], 3.0)
    with pytest.raises(DataError, match="rewards has 2 numbers for 5 calls"):
        episode.trajectory(rewards=[1.0, 2.0])
    made = sequences(episode)
    assert forks == {"sub-agent": 1, "compaction": 1}
    assert len(made.sequences) == 3
    assert len(made.replies) == 5


async def test_a_recorded_coding_session_gives_exactly_its_leaves(gateway, agent_server):
    """The unmodified client, streamed and not. Each sampled id is trained once, and the prompt is counted once."""
    episode = new_episode(gateway, agent_server)
    played, shown = coding_session.requests(max_tokens=10), []
    _, body, stream = next(played)
    async with anthropic_client(episode) as client:
        with contextlib.suppress(StopIteration):
            while True:
                if stream:
                    async with client.messages.stream(**body) as events:
                        reply = await events.get_final_message()
                else:
                    reply = await client.messages.create(**body)
                shown.append(reply.usage.output_tokens)
                _, body, stream = played.send([block.model_dump() for block in reply.content])
    recorded = coding_session.RECORDED
    assert dict(episode.forks) == recorded["forks"]
    trajectory = episode.trajectory(reward=1.0)
    made = tokenize(trajectory, "agent", 0, 0)
    assert made.replies == tuple(shown)
    turns = Counter(turn.sequence for turn in made.turns)
    assert sorted(turns.values()) == sorted(count for each in recorded["leaves"].values() for count in each)
    sampled = [choice.model_extra["token_ids"] for choice in trajectory.choices]
    for turn in made.turns:
        sequence = made.sequences[turn.sequence]
        assert sequence.tokens_S[turn.start : turn.stop].tolist() == sampled[turn.number]
        assert sequence.loss_mask_S[turn.start : turn.stop].all()
    assert sum(sequence.scored for sequence in made.sequences) == sum(shown)
    names = {"claude-opus-9": 10, "claude-haiku-9": 3}
    assert trajectory.metadata["episode"]["model_names"] == names


async def test_a_repeated_request_is_one_sample(gateway, agent_server):
    episode = new_episode(gateway, agent_server)
    async with openai_client(episode) as client:
        ask = client.chat.completions.with_raw_response.create
        options = {"model": "m", "messages": [QUESTION], "max_tokens": 8, "extra_body": ALL_TOKENS}
        first = (await ask(**options)).parse()
        again = (await ask(**options, extra_headers={"x-stainless-retry-count": "1"})).parse()
        assert again.id == first.id
        other = (await ask(**options)).parse()  # not marked as repeated: a second sample
        assert other.id != first.id
        with pytest.raises(asyncio.TimeoutError):  # gives up, and asks again
            async with asyncio.timeout(0.01):
                await ask(**options | {"max_tokens": 64})
        await asyncio.sleep(0.1)
        await ask(**options | {"max_tokens": 64})
    assert dict(episode.forks) == {"retry": 2}
    assert sequences(episode).replies == (8, 8, 64)


async def test_a_key_opens_its_own_episode_until_that_ends(gateway, agent_server, episode):
    other = new_episode(gateway, agent_server)
    swapped = episode.api_key[:19] + other.api_key[19:]
    async with openai_client(episode) as client, anthropic_client(other) as messages:
        await client.chat.completions.create(model="m", messages=[QUESTION], max_tokens=2)
        for key in (swapped, "", "ls--", "ls-x-y", agent_server.api_key):
            with pytest.raises(AuthenticationError, match="no open episode has this key"):
                await client.with_options(api_key=key or "x").chat.completions.create(model="m", messages=[QUESTION])
        await messages.messages.create(model="m", max_tokens=2, messages=[QUESTION])
        assert len(other.trajectory(reward=0.0).choices) == 1
        from anthropic import AuthenticationError as Refused

        with pytest.raises(Refused, match="no open episode"):
            await messages.messages.create(model="m", max_tokens=2, messages=[QUESTION])
    assert len(episode.trajectory(reward=0.0).choices) == 1
    assert episode.api_key not in repr(episode)


async def test_what_the_model_cannot_read_is_refused_by_name(episode, monkeypatch):
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    async with openai_client(episode, max_retries=0) as client, anthropic_client(episode) as messages:
        with pytest.raises(BadRequestError, match="part of type 'image_url'"):
            await client.chat.completions.create(model="m", messages=[image])
        source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
        with pytest.raises(Exception, match="part of type 'image'"):
            await messages.messages.create(
                model="m", max_tokens=2, messages=[{"role": "user", "content": [{"type": "image", "source": source}]}]
            )
        with pytest.raises(BadRequestError, match="list of at least one"):
            await client.chat.completions.create(model="m", messages=[])
        monkeypatch.setattr(app, "LARGEST_BODY", 1 << 20)
        with pytest.raises(Exception, match="413"):
            await client.chat.completions.create(model="m", messages=[{**QUESTION, "content": "x" * (1 << 20)}])
        with pytest.raises(BadRequestError, match="maximum context length"):
            await client.chat.completions.create(model="m", messages=[{**QUESTION, "content": "x" * 4000}])
    with pytest.raises(DataError, match="the agent called nothing"):
        episode.trajectory(reward=0.0)


AGENT = """
import anthropic, openai
with openai.OpenAI().chat.completions.create(
    model="gpt", messages=[{"role": "user", "content": "Go."}], max_tokens=5, stop=["\\n\\n\\n"], stream=True
) as stream:
    print(len([chunk for chunk in stream]))
with anthropic.Anthropic().messages.stream(
    model="claude", messages=[{"role": "user", "content": "Stop."}], max_tokens=5
) as stream:
    print(stream.get_final_message().usage.output_tokens)
"""


async def test_an_agent_in_another_process_needs_its_environment_alone(gateway, agent_server):
    episode = new_episode(gateway, agent_server)
    environment = {**os.environ, "HTTP_PROXY": "http://127.0.0.1:9", **episode.environment()}
    # In the user's own thread: the gateway answers although this event loop stands still.
    done = subprocess.run(
        [sys.executable, "-c", AGENT], check=False, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    trajectory = episode.trajectory(reward=1.0)
    assert len(trajectory.choices) == 2
    assert int(done.stdout.split()[1]) == len(trajectory.choices[1].model_extra["token_ids"])
    assert trajectory.metadata["episode"]["model_names"] == {"gpt": 1, "claude": 1}
    kept = json.loads(trajectory.model_dump_json())
    assert np.isfinite(kept["reward"])


class Served:
    """As much of a model as the example's rollout asks: episodes on the shared server."""

    def __init__(self, gateway, server):
        self._gateway = gateway
        self._endpoint = Endpoint(server.base_url, server.api_key, slots=16, max_model_len=2048)

    def episode(self, *, sampling):
        return self._gateway.episode(Terms("agent@0", lambda: self._endpoint, sampling, seed=3), lambda: None)


async def test_the_examples_agents_run_in_processes_of_their_own(gateway, agent_server):
    task = load_task(examples_folder() / "tool_use" / "agent_task.py")
    for scenario in task.scenarios[:2]:
        trajectory = await task.rollout(Served(gateway, agent_server), scenario, 1.0)
        made = tokenize(trajectory, "agent", 0, 0)
        assert (made.splits, len(made.replies) >= 1) == (0, True)
        assert trajectory.choices[0].model_extra["sampling"]["temperature"] == 1.0
        assert trajectory.reward in (0.0, 0.5, 1.0)


async def test_a_harbor_folders_agent_runs_in_its_sandbox(gateway, agent_server):
    """Its command comes from the model; the tests of the task give the reward."""
    folder = examples_folder() / "harbor"
    options = tomllib.loads((folder / "config.toml").read_text())["task"]["options"]
    try:
        task = task_of(TaskSection(environment="harbor:tasks", steps=1, options=options), folder)
    except ConfigError as error:
        pytest.skip(str(error))
    for scenario in task.scenarios:
        trajectory = await task.rollout(Served(gateway, agent_server), scenario, 1.0)
        made = tokenize(trajectory, "agent", 0, 0)
        assert (made.splits, len(made.replies)) == (0, 1)
        assert scenario.instruction.strip() in trajectory.messages[0]["content"]
        assert trajectory.reward in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("agent", "package"), [("openai_agents_agent.py", "agents"), ("langgraph_agent.py", "langgraph")]
)
async def test_an_sdks_agent_runs_in_a_process_of_its_own(gateway, agent_server, monkeypatch, agent, package):
    """Where its package is: AGENT_PYTHON names the Python that has it."""
    python = os.environ.get("AGENT_PYTHON", sys.executable)
    known = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
    if subprocess.run([python, "-c", known], check=False).returncode:
        pytest.skip(f"{python} has no {package}")
    monkeypatch.setenv("AGENTS", agent)
    task = load_task(examples_folder() / "tool_use" / "agent_task.py")
    for scenario in task.scenarios[:2]:
        trajectory = await task.rollout(Served(gateway, agent_server), scenario, 1.0)
        made = tokenize(trajectory, "agent", 0, 0)
        assert (made.splits, len(made.replies) >= 1) == (0, True)
        assert trajectory.tools[0]["function"]["name"] == "stock"
