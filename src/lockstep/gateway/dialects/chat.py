"""Chat Completions: the plain reply without what was captured, and the same as a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_DELTA = ("role", "content", "reasoning", "tool_calls")
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


class Stream:
    """The reply as server-sent events, chunk by chunk. model: the name that the client asked for."""

    def __init__(self, model: str, body: Mapping[str, Any]):
        self._model = model
        self._usage = bool((body.get("stream_options") or {}).get("include_usage"))

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        """The events of one of the server's chunks, which has more fields than a client knows."""
        parts = []
        for choice in chunk["choices"]:
            delta = {name: choice["delta"][name] for name in _DELTA if choice["delta"].get(name) is not None}
            if delta or choice.get("finish_reason"):
                part = {"index": choice["index"], "delta": delta, "finish_reason": choice.get("finish_reason")}
                logprobs = choice.get("logprobs")
                parts.append(part if logprobs is None else {**part, "logprobs": logprobs})
        return event({**self._head(chunk), "choices": parts}) if parts else b""

    def end(self, plain: Mapping[str, Any]) -> bytes:
        """The last events. A client may have asked for a chunk that counts tokens."""
        usage = event({**self._head(plain), "choices": [], "usage": plain["usage"]}) if self._usage else b""
        return usage + b"data: [DONE]\n\n"

    def _head(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": chunk["id"],
            "created": chunk["created"],
            "model": self._model,
            "object": "chat.completion.chunk",
        }


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def error(status: int, message: str) -> dict[str, Any]:
    """An error's body."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}
