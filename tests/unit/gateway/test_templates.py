"""Conversations of agents on the families' own chat templates: continued, forked or refused, and never trained wrongly."""

# pyright: reportArgumentType=false

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coding_session
from chat_templates import TEMPLATES
from lockstep.batching.tokenize import merge_turns
from lockstep.gateway.dialects import messages
from lockstep.gateway.messages import plain, setting_of
from lockstep.gateway.tree import Tree
from rendering import (
    DRIFTS,
    REAL_TEMPLATES,
    WITHOUT_PARALLEL_CALLS,
    Renderer,
    drifted,
    sampled,
    with_role_tokens,
)

TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}]
SYSTEM = {"role": "system", "content": "Be brief."}
MANY = 400
"""Random conversations per template and property in the slow tier: 10,400 in all."""


def randomly(examples: int):
    """Settings of a property that is drawn so often, for each template."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>|"), min_size=1, max_size=12
).filter(str.strip)


@pytest.fixture(scope="session")
def tokenizer(tiny_qwen3):
    from transformers import AutoTokenizer

    return with_role_tokens(AutoTokenizer.from_pretrained(tiny_qwen3))


@pytest.fixture(params=[*TEMPLATES, "tiny", *REAL_TEMPLATES], scope="module")
def renderer(request, tokenizer) -> Renderer:
    return Renderer(tokenizer, request.param)


class Agent:
    """An agent's conversation, the tree that it makes, and what was sampled."""

    def __init__(self, renderer: Renderer, tools: list | None, *, system: bool):
        self.renderer, self.tools = renderer, tools
        self.tree, self.setting = Tree(), setting_of({"tools": tools})
        self.messages = [SYSTEM] * system + [{"role": "user", "content": "Go."}]
        self.turns: list[SimpleNamespace] = []

    def call(self, thought: str = "", text: str = "yes", calls: int = 0, *, ends: bool = True, parsed: bool = False):
        """Samples a reply to the conversation: its place, and the reply."""
        calls = min(calls, 1) if self.renderer.name in WITHOUT_PARALLEL_CALLS else calls
        place = self.tree.place(self.setting, [plain(message) for message in self.messages])
        prompt = self.renderer.prompt(place, self.tools)
        known = place.history()
        start = 0 if known is None else len(known.ids)
        assert known is None or prompt[:start] == known.ids
        self._holds(prompt[start:], place.new)
        message, ids = sampled(self.renderer, thought, text, calls, ends=ends, parsed=parsed)
        self.tree.add(self.setting, place, prompt[start:], len(self.turns), [(plain(message), ids)])
        self.turns.append(SimpleNamespace(prompt_S=np.array(prompt), sampled_S=np.array(ids), ends=ends))
        return place, message

    def after(self, message: dict, words: str) -> list[dict]:
        """What a harness sends after a reply: the results of its calls, or the next question."""
        calls = message["tool_calls"] or []
        results = [{"role": "tool", "tool_call_id": "c", "content": f"{words} {n}"} for n in range(len(calls))]
        return results or [{"role": "user", "content": words}]

    def _holds(self, ids: list[int], messages: list[dict]) -> None:
        """The ids have the messages' own text, in their order."""
        rendered, position = self.renderer.tokenizer.decode(ids), 0
        for message in messages:
            if message["role"] == "assistant":
                continue
            text = message["content"].strip()
            quoted = json.dumps(message["content"], ensure_ascii=False)
            place = max(rendered.find(text, position), rendered.find(quoted, position))
            assert place >= 0, (rendered, message)
            position = place

    def sequences(self) -> list[np.ndarray]:
        """The training sequences; each sampled token is trained in one of them."""
        merged = merge_turns(self.turns)
        assert sum(map(len, merged)) == len(self.turns)
        return [np.concatenate([part[-1].prompt_S, part[-1].sampled_S]) for part in merged]

    def unique_ids(self) -> int:
        contexts = list(self.tree.contexts())
        return sum(len(node.ids) + sum(len(reply.ids) for reply in node.replies) for node in contexts)


TURN = st.tuples(st.one_of(st.just(""), WORDS), WORDS, st.integers(0, 2), st.booleans(), st.booleans(), WORDS)


DRIFTING = given(
    turns=st.lists(TURN, min_size=2, max_size=5),
    drift=st.sets(st.sampled_from(DRIFTS)),
    system=st.booleans(),
    tools=st.booleans(),
)


def _one_sequence(renderer, turns, drift, system, tools):
    agent = Agent(renderer, TOOLS if tools else None, system=system)
    turn_end = renderer.tokenizer.convert_tokens_to_ids(renderer.turn_end)
    following: list[dict] = []
    for number, (thought, text, calls, ends, parsed, words) in enumerate(turns):
        place, message = agent.call(thought, text, calls, ends=ends, parsed=parsed)
        if number:  # the turn ends once, whether the model or its limit ended it
            before, now = agent.turns[-2:]
            first = now.prompt_S[len(before.prompt_S) + len(before.sampled_S)]
            assert (first == turn_end) != before.ends
        assert place.known == (0 if number == 0 else len(agent.messages) - len(following))
        following = agent.after(message, words)
        agent.messages = [*agent.messages, drifted(message, drift), *following]
    assert not agent.tree.forks()
    assert len(agent.sequences()) == 1
    assert len(agent.sequences()[0]) == agent.unique_ids()


@randomly(20)
@DRIFTING
def test_an_agent_whatever_it_does_to_replies_gives_one_sequence(renderer, turns, drift, system, tools):
    _one_sequence(renderer, turns, drift, system, tools)


@pytest.mark.slow
@randomly(MANY)
@DRIFTING
def test_thousands_of_random_drifts_give_one_sequence_each(renderer, turns, drift, system, tools):
    _one_sequence(renderer, turns, drift, system, tools)


def test_ten_turns_of_a_tool_agent_that_drops_thinking_are_one_sequence(renderer):
    agent = Agent(renderer, TOOLS, system=True)
    for turn in range(10):
        _, message = agent.call(f"thought {turn}", f"text {turn}", turn % 3, ends=turn != 4, parsed=turn % 2 == 0)
        agent.messages += [drifted(message, {"thinking", "null", "keys"}), *agent.after(message, f"result {turn}")]
    (sequence,) = agent.sequences()
    assert len(sequence) <= 1.05 * agent.unique_ids()
    assert not agent.tree.forks()


def _edit(agent: Agent, position: int, words: str) -> None:
    """Other words in one message of the history."""
    message = {**agent.messages[position], "content": f"{words} edited {len(agent.turns)}"}
    agent.messages = [*agent.messages[:position], message, *agent.messages[position + 1 :]]


CHANGE = st.sampled_from(["none", "none", "edit", "retry", "compaction", "sub-agent"])


CHANGING = given(
    turns=st.lists(st.tuples(CHANGE, TURN, st.integers(0, 99)), min_size=2, max_size=7),
    drift=st.sets(st.sampled_from(DRIFTS)),
)


def _forked(renderer, turns, drift):
    agent = Agent(renderer, TOOLS, system=True)
    live: list[int] = []  # where the conversation has replies that the tree has, too
    for change, (thought, text, calls, ends, parsed, words), drawn in turns:
        main, kept = agent.messages, live
        if change == "edit":
            position = drawn % len(main)
            _edit(agent, position, words)
            live = [reply for reply in live if reply < position]
        elif change == "compaction":
            agent.messages, live = [SYSTEM, {"role": "user", "content": f"{words} so far {len(agent.turns)}"}], []
        elif change == "sub-agent":
            agent.messages, live = [{"role": "system", "content": f"{words} {len(agent.turns)}"}, *main[1:2]], []
        place, message = agent.call(thought, text, calls, ends=ends, parsed=parsed)
        assert place.known == (live[-1] + 1 if live else 0)
        if change == "sub-agent":
            agent.messages, live = main, kept
        elif change != "retry":
            live = [*live, len(agent.messages)]
            agent.messages = [*agent.messages, drifted(message, drift), *agent.after(message, words)]
    assert agent.sequences()


@randomly(20)
@CHANGING
def test_a_history_that_changes_forks_where_it_changed(renderer, turns, drift):
    _forked(renderer, turns, drift)


@pytest.mark.slow
@randomly(MANY)
@CHANGING
def test_thousands_of_random_changes_fork_where_the_history_changed(renderer, turns, drift):
    _forked(renderer, turns, drift)


def test_examples_that_an_agent_brings_do_not_end_its_conversation(renderer):
    """A template may write a reply with its thinking first, and without once a question follows."""
    agent = Agent(renderer, TOOLS, system=True)
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    brought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nLooking.", "tool_calls": [call]}
    agent.messages += [brought, {"role": "tool", "tool_call_id": "c", "content": "nothing"}]
    for turn in range(3):
        _, message = agent.call(f"thought {turn}", f"text {turn}")
        agent.messages += [drifted(message, {"thinking"}), *agent.after(message, f"question {turn}")]
    assert len(agent.sequences()) == 1


@pytest.mark.parametrize("thinking", [True, False])
def test_a_recorded_coding_session_gives_exactly_its_leaves(renderer, thinking):
    """Ten turns, streams, a compaction and two sub-agents, in Anthropic's dialect, with calls and thinking that is dropped."""
    agents: list[str] = []
    session = Agent(renderer, None, system=False)
    played = coding_session.requests(max_tokens=8)
    name, body, _ = next(played)
    with contextlib.suppress(StopIteration):
        while True:
            chat = messages.request(body)
            session.tools, session.messages, session.setting = chat.get("tools"), chat["messages"], setting_of(chat)
            agents.append(name)
            thought = f"thought {len(agents)}" if thinking else ""
            calls = len(agents) % 3 if chat.get("tools") else 0
            _, message = session.call(thought, f"text {len(agents)}", calls, ends=len(agents) != 4, parsed=thinking)
            full = {
                "id": "r",
                "choices": [{"message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1},
            }
            name, body, _ = played.send(messages.reply(full, "m")["content"])
    assert dict(session.tree.forks()) == coding_session.RECORDED["forks"]
    leaves = sorted(turns for each in coding_session.RECORDED["leaves"].values() for turns in each)
    merged = merge_turns(session.turns)
    assert sorted(map(len, merged)) == leaves
    assert sum(map(len, session.sequences())) <= 1.05 * session.unique_ids()
