"""Messages of Chat Completions: what an agent sends, and when two of them are the same message.

Harnesses send a reply back with other whitespace, sorted arguments, without its thinking and with fields set to null. None
of these makes another message. Everything else that a chat template can see does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.gateway.refusal import Refusal

Message = dict[str, Any]
_THINKING = re.compile(r"^\s*(<think>)?.*?</think>", re.DOTALL)
_REASONING = ("reasoning", "reasoning_content")


def text_of(message: Mapping[str, Any]) -> str:
    """The message's text; parts are joined. Raises Refusal, naming the type, for a part that is no text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Refusal(400, f"a message's content is a {type(content).__name__}: send a text or a list of parts")
    return "".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "refusal":
        return str(part.get("refusal") or "")
    raise Refusal(
        400, f"a message has a part of type {kind!r}: the model reads text alone, send no images, audio or files"
    )


def plain(message: Any) -> Message:
    """The message with its text as one string and without fields that are null. Raises Refusal for one that is malformed."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise Refusal(400, "messages must be a list of objects, each with a role")
    kept = {name: value for name, value in message.items() if value is not None and value != []}
    kept["content"] = text_of(message)
    if kept["role"] == "developer":
        kept["role"] = "system"
    return kept


def identity(message: Message) -> tuple[Any, ...]:
    """What two messages must share to be the same one."""
    role = message["role"]
    if role == "assistant":
        text = _THINKING.sub("", message["content"], count=1)
        return role, " ".join(text.split()), _calls(message), None
    lines = [line.rstrip() for line in message["content"].strip().splitlines()]
    return role, "\n".join(lines), None, message.get("name")


def same_reply(sent: Message, sampled: Message) -> bool:
    """Whether `sent` is `sampled` as a harness gives it back. Thinking may be missing; thinking of its own makes another message."""
    if identity(sent) != identity(sampled):
        return False
    thought = _words(_thinking(sent))
    return not thought or thought == _words(_thinking(sampled))


def _thinking(message: Message) -> str:
    thought = next((message[name] for name in _REASONING if message.get(name)), None)
    if thought is None:
        match = _THINKING.match(message["content"])
        thought = match.group(0) if match else ""
    return thought.replace("<think>", "").replace("</think>", "") if isinstance(thought, str) else json.dumps(thought)


def _words(text: str) -> list[str]:
    return text.split()


def _calls(message: Message) -> tuple[tuple[str, str], ...]:
    functions = [call.get("function") or {} for call in message.get("tool_calls") or []]
    return tuple((str(function.get("name")), _arguments(function.get("arguments"))) for function in functions)


def _arguments(arguments: Any) -> str:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return " ".join(arguments.split())
    return json.dumps(arguments, sort_keys=True)


def setting_of(request: Mapping[str, Any]) -> str:
    """The rest of a request that the chat template sees, as JSON: the tools, and the template's own
    arguments.
    """
    seen = (request.get("tools") or None, request.get("chat_template_kwargs") or None)
    return json.dumps(seen, sort_keys=True)


def common_prefix(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages two conversations share from their beginning."""
    count = 0
    for left, right in zip(first, second, strict=False):
        if identity(left) != identity(right):
            break
        count += 1
    return count
