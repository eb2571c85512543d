"""Stage tokenizer_and_template: tokens, end of turn and chat template, as trainer and server read
them.

The trainer's side renders with transformers' tokenizer; the server's template is the one that its
files name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lockstep.inference.tokenizer_files import read_tokenizer
from lockstep.models.registry import load_model_config
from lockstep.validate.figures import Figure, Outcome, count, judged
from lockstep.validate.request import Request

_TEXTS = (
    "The capital of France is Paris.",
    "def add(a, b):\n    return a + b  # 42\n",
    "naïve café, Zürich, 東京, Ελλάδα, 🙂",
    '{"name": "find", "arguments": {"query": "a  b", "n": 3}}',
    "  two spaces, a tab\t, and\n\nempty lines\n",
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "find_town",
        "description": "Find a town.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "find_town", "arguments": '{"name": "Ulm"}'}}
Messages = list[dict[str, Any]]
SCENES: Mapping[str, tuple[Messages, list[dict[str, Any]] | None]] = {
    "plain": ([{"role": "user", "content": "Hello."}], None),
    "system": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}], None),
    "multi-turn": (
        [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Good day."},
            {"role": "user", "content": "And now?"},
        ],
        None,
    ),
    "reasoning": (
        [
            {"role": "user", "content": "40 + 2?"},
            {"role": "assistant", "content": "<think>\nforty and two\n</think>\n\n42"},
            {"role": "user", "content": "Sure?"},
        ],
        None,
    ),
    "tools": ([{"role": "user", "content": "Where is Ulm?"}], [_TOOL]),
    "tool result": (
        [
            {"role": "user", "content": "Where is Ulm?"},
            {"role": "assistant", "content": "<think>\nan old town\n</think>\n\n", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "on the Danube"},
        ],
        [_TOOL],
    ),
}
"""Conversations that a rollout may have: (messages, tools)."""


def scenes(tokenizer: Any) -> dict[str, tuple[Messages, list[dict[str, Any]] | None]]:
    """Those that the chat template knows: one that never names tools is of a model without them."""
    tools = re.search(r"\btools\b", tokenizer.chat_template or "")
    return {name: scene for name, scene in SCENES.items() if tools or scene[1] is None}


def run(request: Request) -> Outcome:
    """See the module."""
    tokenizer = load_tokenizer(request)
    config = load_model_config(str(request.base_model))
    server = read_tokenizer(request.base_model, request.server_args)
    figures = measure(tokenizer, (server.template, server.tool_template), config.vocab_size, config.eos_token_ids)
    notes = [f"{len(tokenizer)} tokens, {config.vocab_size} rows; a turn ends with {tokenizer.eos_token!r}"]
    notes += [f"{name}: the template knows no tools" for name in SCENES if name not in scenes(tokenizer)]
    notes.append(f"reasoning of earlier turns is {'kept' if keeps_reasoning(tokenizer) else 'dropped'} by the template")
    return judged(figures, notes)


def load_tokenizer(request: Request) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(request.base_model)


def keeps_reasoning(tokenizer: Any) -> bool:
    """True if the template renders the reasoning of an earlier turn."""
    return "forty and two" in render(tokenizer, *SCENES["reasoning"])


def render(tokenizer: Any, messages: Messages, tools: Any = None, template: str | None = None, **options: Any) -> str:
    """The prompt's text, with a call's arguments as an object, as the server gives them to a template.

    template: another than the tokenizer's.
    """
    messages = [_with_objects(message) for message in messages]
    options = {"add_generation_prompt": True} | options
    return tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False, **options)


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [{"function": {**function, "arguments": json.loads(function["arguments"])}} for function in functions]
    return message | {"tool_calls": calls}


def measure(tokenizer: Any, server: tuple[str | None, str | None], rows: int, ends: Sequence[int]) -> list[Figure]:
    """The stage's figures. server: the server's template without and with tools; rows: of the
    embedding; ends: token ids that end a reply in the server.
    """
    largest = max(tokenizer.get_vocab().values())
    changed = [text for text in _TEXTS if tokenizer.decode(_ids(tokenizer, text)) != text]
    return [
        count("token ids without a row", max(0, largest + 1 - rows)),
        count("texts that decode to another text", len(changed), where=changed[0] if changed else ""),
        _named("turns that end with no end token", _wrong_ends(tokenizer, ends)),
        _named("prompts that change when a reply follows", _unstable(tokenizer)),
        _named("scenes that trainer and server render differently", _differing(tokenizer, server)),
        _named("tools that the prompt does not name", _hidden_tools(tokenizer)),
    ]


def _named(name: str, wrong: Iterable[str]) -> Figure:
    places = list(wrong)
    return count(name, len(places), where=", ".join(places))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _wrong_ends(tokenizer: Any, ends: Sequence[int]) -> list[str]:
    """The token behind a reply must be the tokenizer's end, which the server adds to the config's."""
    turn = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Good day."}]
    text = render(tokenizer, turn, add_generation_prompt=False)
    ids = _ids(tokenizer, text[text.rindex("Good day.") + len("Good day.") :])
    if not ids:
        return ["nothing follows a reply"]
    stops = {tokenizer.eos_token_id}
    wrong = [] if ids[0] in stops else [f"{tokenizer.decode(ids[:1])!r} is not {tokenizer.eos_token!r}"]
    if ends and tokenizer.eos_token_id not in ends:
        wrong.append(f"config.json ends with {list(ends)}, the tokenizer with {tokenizer.eos_token_id}")
    return wrong


def _unstable(tokenizer: Any) -> list[str]:
    """A prompt must be the beginning of the same conversation with its reply. As text: sampled ids
    are kept as they are, so that no token spans both.
    """
    wrong = []
    for name, (messages, tools) in scenes(tokenizer).items():
        reply = [*messages, {"role": "assistant", "content": "Good day."}]
        longer = render(tokenizer, reply, tools, add_generation_prompt=False)
        if not longer.startswith(render(tokenizer, messages, tools)):
            wrong.append(name)
    return wrong


def _differing(tokenizer: Any, server: tuple[str | None, str | None]) -> list[str]:
    wrong = []
    for name, (messages, tools) in scenes(tokenizer).items():
        template = server[1] if tools else server[0]
        if template is None or render(tokenizer, messages, tools) != render(tokenizer, messages, tools, template):
            wrong.append(name)
    return wrong


def _hidden_tools(tokenizer: Any) -> list[str]:
    shown = [render(tokenizer, *scene) for name, scene in scenes(tokenizer).items() if name == "tools"]
    return ["find_town" for text in shown if "find_town" not in text]
