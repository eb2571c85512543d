"""A chat reply that is streamed, put together: the same object as without a stream.

A request with `FIELD` gets OpenAI's chunks, and one event before the last: `{"lockstep_reply": ...}`, the whole reply with
everything that training needs. The field is a number of seconds: what is sampled between two events is joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELD = "lockstep_whole_reply"
"""The request's field that asks for the event: seconds between two events, 0 for each chunk as it comes."""
EVENT = "lockstep_reply"
_TEXTS = ("content", "reasoning")


class StreamedReply:
    """Chunks of one chat reply, added up."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._usage: dict[str, Any] | None = None
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """The next chunk, as in JSON."""
        for name in ("id", "created", "model", "prompt_token_ids"):
            if chunk.get(name) is not None:
                self._head.setdefault(name, chunk[name])
        self._usage = chunk.get("usage") or self._usage
        for part in chunk.get("choices") or []:
            self._add_part(self._choices.setdefault(part["index"], _choice(part["index"])), part)

    def completed(self) -> dict[str, Any] | None:
        """The reply; None where a choice has not ended, so that there is none."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        if not choices or any(choice["finish_reason"] is None for choice in choices) or self._usage is None:
            return None
        for choice in choices:
            message = choice["message"]
            message["tool_calls"] = [call for _, call in sorted(message["tool_calls"].items())]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage}

    def _add_part(self, choice: dict[str, Any], part: Mapping[str, Any]) -> None:
        choice["token_ids"] += part.get("token_ids") or []
        for name in ("finish_reason", "stop_reason"):
            choice[name] = choice[name] if part.get(name) is None else part[name]
        logprobs = (part.get("logprobs") or {}).get("content")
        if logprobs is not None:
            choice["logprobs"] = choice["logprobs"] or {"content": []}
            choice["logprobs"]["content"] += logprobs
        message, delta = choice["message"], part.get("delta") or {}
        for name in _TEXTS:
            if delta.get(name):
                message[name] = (message[name] or "") + delta[name]
        for call in delta.get("tool_calls") or []:
            _add_call(message["tool_calls"].setdefault(call["index"], _call()), call)


def _choice(index: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": None, "reasoning": None, "tool_calls": {}}
    ends = {"finish_reason": None, "stop_reason": None, "logprobs": None}
    return {"index": index, "message": message, "token_ids": [], **ends}


def _call() -> dict[str, Any]:
    return {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}


def _add_call(call: dict[str, Any], delta: Mapping[str, Any]) -> None:
    call["id"] = delta.get("id") or call["id"]
    function = delta.get("function") or {}
    for name in ("name", "arguments"):
        call["function"][name] += function.get(name) or ""


def join(pending: list[dict[str, Any]], chunk: dict[str, Any]) -> None:
    """Adds a chunk to those that wait: its text to that of the chunk before it, where both have the same kind.

    pending: chunks of at most one choice each. The token ids of a chunk that was joined are left out.
    """
    for part in chunk.get("choices") or []:
        last = next((before for before in reversed(pending) if _index(before) == part["index"]), None)
        if last is None or not _joined(last["choices"][0], part):
            pending.append({**chunk, "choices": [part]})
    if not chunk.get("choices"):
        pending.append(chunk)


def _index(chunk: Mapping[str, Any]) -> int | None:
    choices = chunk.get("choices")
    return choices[0]["index"] if choices else None


def _joined(last: dict[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether the part was added to `last`. Text after thinking, and a call that begins, are chunks of their own."""
    before, delta = last["delta"], part["delta"]
    kinds = [name for name, value in delta.items() if value]
    known_kinds = [name for name, value in before.items() if value and name != "role"]
    if last.get("finish_reason") is not None or len(kinds) > 1 or (kinds and kinds != known_kinds):
        return False
    for name in kinds:
        if name in _TEXTS:
            before[name] += delta[name]
            continue
        (call, *others), known = delta[name], before[name][-1]
        if others or name != "tool_calls" or call.get("id") or call["index"] != known["index"]:
            return False
        known["function"]["arguments"] = (known["function"].get("arguments") or "") + (
            call["function"].get("arguments") or ""
        )
    if (logprobs := part.get("logprobs")) is not None:
        last["logprobs"] = last.get("logprobs") or {"content": []}
        last["logprobs"]["content"] += logprobs["content"]
    last |= {name: part[name] for name in ("finish_reason", "stop_reason") if part.get(name) is not None}
    last.pop("token_ids", None)
    return True
