"""Chat Completions: the plain reply without what was captured, and the same as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_CHOICE = ("index", "message", "logprobs", "finish_reason")
_MESSAGE = ("role", "content", "reasoning", "reasoning_content", "tool_calls", "refusal")


def reply(full: Mapping[str, Any], model: str) -> dict[str, Any]:
    """What the client sees: OpenAI's own fields. model: the name that it asked for."""
    choices = [{name: choice.get(name) for name in _CHOICE} for choice in full["choices"]]
    for choice in choices:
        message = choice["message"]
        choice["message"] = {name: message[name] for name in _MESSAGE if message.get(name)} | {
            "role": "assistant",
            "content": message.get("content"),
        }
    head = {name: full[name] for name in ("id", "created", "usage")}
    return {**head, "object": "chat.completion", "model": model, "choices": choices}


def events(plain: Mapping[str, Any], *, usage: bool) -> Iterator[bytes]:
    """The reply as server-sent events. usage: the client asked for a last chunk that counts tokens."""
    head = {name: plain[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for choice in plain["choices"]:
        for delta in _deltas(choice["message"]):
            part = {"index": choice["index"], "delta": delta, "finish_reason": None}
            if choice["logprobs"] is not None and "content" in delta and delta["content"]:
                part["logprobs"] = choice["logprobs"]
            yield event({**head, "choices": [part]})
        end = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
        yield event({**head, "choices": [end]})
    if usage:
        yield event({**head, "choices": [], "usage": plain["usage"]})
    yield b"data: [DONE]\n\n"


def _deltas(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": ""}
    for name in ("reasoning", "reasoning_content", "content"):
        if message.get(name):
            yield {name: message[name]}
    for index, call in enumerate(message.get("tool_calls") or []):
        yield {"tool_calls": [{"index": index, **call}]}


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def error(status: int, message: str) -> dict[str, Any]:
    """An error's body."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}
