"""Which reply a request continues, what became of a history that changed, and templates that can't be continued."""

from __future__ import annotations

import pytest

from lockstep.gateway.messages import plain
from lockstep.gateway.tree import Tree
from lockstep_wire import history
from rendering import Renderer, sampled


@pytest.fixture(scope="session")
def tokenizer(tiny_qwen3):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_qwen3)


def test_a_template_that_renders_a_message_by_its_neighbours_is_refused(tokenizer):
    numbered = "{%- for m in messages %}"
    numbered += "{{- '<|im_start|>' + m.role + loop.index|string + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    renderer = Renderer(tokenizer, "numbered", numbered)
    tree, first = Tree(), [{"role": "system", "content": "s"}, {"role": "user", "content": "Go."}]
    place = tree.place("", [plain(message) for message in first])
    message, tokens = sampled(renderer, "", "yes", 0, ends=True)
    tree.add("", place, renderer.render(first, None), 0, [(plain(message), tokens)])
    place = tree.place("", [plain(each) for each in [*first, message, {"role": "user", "content": "On."}]])
    with pytest.raises(history.MisalignedError, match=r"token \d+ of the prompt is \d+ where"):
        renderer.prompt(place, None)


def test_a_template_that_changes_the_past_is_refused(tokenizer):
    counted = (
        "{{- messages | length }}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    renderer = Renderer(tokenizer, "counted", counted)
    tree, first = Tree(), [{"role": "user", "content": "Go."}]
    message, tokens = sampled(renderer, "", "yes", 0, ends=True)
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
