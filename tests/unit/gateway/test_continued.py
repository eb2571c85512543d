"""Prompts that continue sampled ids: equal to what was sampled, plus what the template makes of the new messages."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chat_templates import TEMPLATES
from lockstep.gateway.messages import plain, setting_of
from lockstep.gateway.tree import Tree
from lockstep_wire import history

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


class Renderer:
    """A tokenizer with one template, and what the server does with a request."""

    def __init__(self, tokenizer, template: str | None):
        self.tokenizer, self.template = tokenizer, template

    def render(self, messages, tools, prompt=True) -> list[int]:
        messages = copy.deepcopy(messages)
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tools=tools, add_generation_prompt=prompt, return_dict=False
        )

    def prompt(self, place, tools) -> list[int]:
        full, known = self.render(place.conversation(), tools), place.history()
        if known is None:
            return full
        known = history.decode(known.encode())
        short = self.render(history.short_conversation(place.conversation()[known.messages :]), tools)
        marker = self.tokenizer.encode(history.MARKER, add_special_tokens=False)
        asking = [history.STANDS_FOR_ASKING]
        opened = history.generation_prompt(self.render(asking, tools), self.render(asking, tools, prompt=False))
        return history.continued(known, full, history.after_marker(short, marker), opened)


@pytest.fixture(scope="session")
def tokenizer(tiny_qwen3):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_qwen3)


@pytest.fixture(params=[*TEMPLATES, "tiny"])
def renderer(request, tokenizer) -> Renderer:
    return Renderer(tokenizer, TEMPLATES.get(request.param))


def sampled(renderer: Renderer, thought: str, text: str, calls: int, ends: bool) -> tuple[dict, list[int]]:
    """A reply as a server gives it, and its ids: other whitespace than any template writes."""
    arguments = '{"b" :1,  "a": [2, "ü"]}'
    raw = f"<think>\n {thought}\n</think>\n" if thought else ""
    raw += text + "".join(f' <tool_call>{{"name":"look","arguments":{arguments}}}</tool_call>' for _ in range(calls))
    ids = renderer.tokenizer.encode(raw, add_special_tokens=False)
    ids += renderer.tokenizer.encode("<|im_end|>", add_special_tokens=False) if ends else []
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    content = f"<think>\n {thought}\n</think>\n{text}" if thought else text
    return {"role": "assistant", "content": content, "tool_calls": [call] * calls or None, "refusal": None}, ids


def drifted(message: dict, drift: set[str]) -> dict:
    """The reply as a harness may give it back."""
    message = copy.deepcopy(message)
    if "null" in drift:
        message |= {"audio": None, "annotations": []}
    if "thinking" in drift:
        message["content"] = message["content"].split("</think>\n")[-1]
    if "space" in drift:
        message["content"] = f"\n{message['content'].strip()}  "
    if "parts" in drift:
        message["content"] = [{"type": "text", "text": message["content"]}]
    if "keys" in drift and message["tool_calls"]:
        for call in message["tool_calls"]:
            call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True)
    return message


DRIFTS = st.sets(st.sampled_from(["null", "thinking", "space", "parts", "keys"]))
WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>|"), min_size=1, max_size=12
).filter(str.strip)
TURN = st.tuples(st.one_of(st.just(""), WORDS), WORDS, st.integers(0, 2), st.booleans(), WORDS)


def _after(calls: int, words: str) -> list[dict]:
    """What a harness sends after a reply: the results of its calls, or the next question."""
    if not calls:
        return [{"role": "user", "content": words}]
    return [{"role": "tool", "tool_call_id": "c", "content": f"{words} {number}"} for number in range(calls)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(TURN, min_size=2, max_size=5), drift=DRIFTS, system=st.booleans(), tools=st.booleans())
def test_an_agent_whatever_it_does_to_replies_gives_one_sequence(renderer, turns, drift, system, tools):
    offered = TOOLS if tools else None
    tree, setting = Tree(), setting_of({"tools": offered})
    conversation = [{"role": "system", "content": "Be brief."}] * system + [{"role": "user", "content": "Go."}]
    ids: list[int] = []
    for number, (thought, text, calls, ends, words) in enumerate(turns):
        place = tree.place(setting, [plain(message) for message in conversation])
        prompt = renderer.prompt(place, offered)
        assert prompt[: len(ids)] == ids
        if number:  # the turn ends once, whether the model or its limit ended it
            turn_end = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert (prompt[len(ids)] == turn_end) != turns[number - 1][3]
        assert place.known == (0 if number == 0 else len(conversation) - len(_after(turns[number - 1][2], "")))
        text_of_prompt = renderer.tokenizer.decode(prompt[len(ids) :])
        assert all(
            message["content"].strip() in text_of_prompt for message in place.new if message["role"] != "assistant"
        )
        message, tokens = sampled(renderer, thought, text, calls, ends)
        tree.add(setting, place, prompt[len(ids) :], number, [(plain(message), tokens)])
        ids = prompt + tokens
        conversation = [*conversation, drifted(message, drift), *_after(calls, words)]
    assert len(list(tree.contexts())) == len(turns)
    assert not tree.forks()


def test_a_template_that_renders_a_message_by_its_neighbours_is_refused(tokenizer):
    numbered = "{%- for m in messages %}"
    numbered += "{{- '<|im_start|>' + m.role + loop.index|string + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    renderer = Renderer(tokenizer, numbered)
    tree, first = Tree(), [{"role": "system", "content": "s"}, {"role": "user", "content": "Go."}]
    place = tree.place("", [plain(message) for message in first])
    message, tokens = sampled(renderer, "", "yes", 0, True)
    tree.add("", place, renderer.render(first, None), 0, [(plain(message), tokens)])
    place = tree.place("", [plain(each) for each in [*first, message, {"role": "user", "content": "On."}]])
    with pytest.raises(history.MisalignedError, match=r"token \d+ of the prompt is \d+ where"):
        renderer.prompt(place, None)


def test_a_template_that_changes_the_past_is_refused(tokenizer):
    counted = (
        "{{- messages | length }}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    renderer = Renderer(tokenizer, counted)
    tree, first = Tree(), [{"role": "user", "content": "Go."}]
    message, tokens = sampled(renderer, "", "yes", 0, True)
    tree.add(
        "", tree.place("", [plain(each) for each in first]), renderer.render(first, None), 0, [(plain(message), tokens)]
    )
    place = tree.place("", [plain(each) for each in [*first, message, {"role": "user", "content": "On."}]])
    with pytest.raises(history.MisalignedError, match="token 0 of the prompt was"):
        renderer.prompt(place, None)


QUESTION, OTHER = {"role": "user", "content": "Go."}, {"role": "user", "content": "Stop."}
SYSTEM = {"role": "system", "content": "Be brief."}


def _grown(*conversations, settings=("",)) -> Tree:
    """A tree of calls, each with the reply "r" and its number."""
    tree = Tree()
    for call, conversation in enumerate(conversations):
        setting = settings[min(call, len(settings) - 1)]
        place = tree.place(setting, [plain(message) for message in conversation])
        ids = [ord(letter) for message in place.new for letter in message["content"]]
        tree.add(setting, place, ids, call, [({"role": "assistant", "content": f"r{call}"}, [1])])
    return tree


def _reply(call: int) -> dict:
    return {"role": "assistant", "content": f"r{call}"}


LONG = [SYSTEM, QUESTION, _reply(0), OTHER]


@pytest.mark.parametrize(
    ("conversations", "kinds"),
    [
        pytest.param([LONG[:2], LONG], {}, id="none"),
        pytest.param([LONG[:2], LONG[:2]], {"retry": 1}, id="retry"),
        pytest.param(
            [LONG[:2], LONG, [SYSTEM, {"role": "user", "content": "So far: r."}]], {"compaction": 1}, id="compaction"
        ),
        pytest.param([LONG[:2], LONG, [*LONG[:3], QUESTION, _reply(1), OTHER]], {"edit": 1}, id="edit"),
        pytest.param(
            [LONG[:2], [{"role": "system", "content": "Search."}, QUESTION]], {"sub-agent": 1}, id="instructions"
        ),
        pytest.param([LONG[:2], [SYSTEM, OTHER], LONG], {"sub-agent": 1}, id="the-first-goes-on"),
    ],
)
def test_forks_are_told_apart(conversations, kinds):
    assert dict(_grown(*conversations).forks()) == kinds


def test_other_tools_are_a_sub_agent():
    assert dict(_grown(LONG[:2], LONG[:2], settings=("a", "b")).forks()) == {"sub-agent": 1}


def test_edited_thinking_and_edited_arguments_fork():
    tree = Tree()
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    reply = {"role": "assistant", "content": "<think>\none\n</think>\nyes", "tool_calls": [call]}
    tree.add("", tree.place("", [QUESTION]), [7], 0, [(reply, [8])])
    same = {**reply, "content": "yes"}
    other = {**call, "function": {"name": "look", "arguments": '{"a": 2}'}}
    for message, known in [
        (reply, 2),
        (same, 2),
        ({**same, "tool_calls": [other]}, 0),
        ({**same, "content": "no"}, 0),
        ({**reply, "content": "<think>two</think>yes"}, 0),
        ({**same, "reasoning": "two"}, 0),
        ({**same, "reasoning": "one "}, 2),
    ]:
        assert tree.place("", [QUESTION, message, OTHER]).known == known, message
