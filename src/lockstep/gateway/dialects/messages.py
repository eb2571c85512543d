"""Anthropic's Messages: requests to Chat Completions and replies back, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lockstep.gateway.messages import text_of
from lockstep.gateway.refusal import Refusal

_SAME = ("temperature", "top_p", "top_k")
_STOPS = {"length": "max_tokens", "tool_calls": "tool_use"}


def request(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request of Chat Completions. Raises Refusal for what has no counterpart there."""
    messages: list[dict[str, Any]] = []
    if body.get("system"):
        messages.append({"role": "system", "content": text_of({"content": body["system"]})})
    for message in body.get("messages") or []:
        messages += _messages(message)
    chat: dict[str, Any] = {"messages": messages}
    chat |= {name: body[name] for name in _SAME if body.get(name) is not None}
    if body.get("max_tokens") is not None:
        chat["max_tokens"] = body["max_tokens"]
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    if body.get("tools"):
        chat["tools"] = [_tool(tool) for tool in body["tools"]]
        chat |= _tool_choice(body.get("tool_choice") or {"type": "auto"})
    return chat


def _messages(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts, thoughts, calls, results = [], [], [], []
    for block in content or []:
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(block.get("thinking") or "")
        elif kind == "tool_use":
            function = {"name": block["name"], "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "tool_result":
            text = text_of({"content": block.get("content")})
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind != "redacted_thinking":
            texts.append(text_of({"content": [block]}))
    if role == "assistant":
        made = {"role": role, "content": "".join(texts), "tool_calls": calls, "reasoning": "".join(thoughts)}
        return [{name: value for name, value in made.items() if value or name == "content"}]
    return [*results, *([{"role": role, "content": "".join(texts)}] if texts else [])]


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "input_schema" not in tool:
        raise Refusal(
            400,
            f"tool {tool.get('name')!r} of type {tool.get('type')!r} runs at Anthropic: offer tools with an input_schema",
        )
    function = {"name": tool["name"], "description": tool.get("description") or "", "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _tool_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    if choice["type"] == "tool":
        asked: Any = {"type": "function", "function": {"name": choice["name"]}}
    else:
        asked = {"any": "required"}.get(choice["type"], choice["type"])
    return {"tool_choice": asked} | ({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})


def reply(full: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A message of the first choice. model: the name that the client asked for."""
    choice = full["choices"][0]
    message, stop = choice["message"], choice.get("stop_reason")
    blocks: list[dict[str, Any]] = []
    thought = message.get("reasoning") or message.get("reasoning_content")
    if thought:
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls") or []:
        function = call["function"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": _input(function)})
    reason = _STOPS.get(choice["finish_reason"], "stop_sequence" if isinstance(stop, str) else "end_turn")
    usage = full["usage"]
    return {
        "id": f"msg_{full['id']}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_reason": reason,
        "stop_sequence": stop if reason == "stop_sequence" else None,
        "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]},
    }


def _input(function: Mapping[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {"malformed_arguments": function["arguments"]}


class Stream:
    """The message as Anthropic's events: thinking and text as they come, a call once its arguments are whole."""

    def __init__(self, model: str, body: Mapping[str, Any]):
        del body
        self._model = model
        self._open: str | None = None
        self._blocks = 0

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        """The events of one of the server's chunks; those of further choices are not shown."""
        events = b""
        if chunk.get("prompt_token_ids") is not None:
            events += _event({"type": "message_start", "message": self._begun(chunk)})
        for choice in chunk["choices"]:
            for name, kind in (("reasoning", "thinking"), ("content", "text")):
                if choice["index"] == 0 and choice["delta"].get(name):
                    events += self._opened(kind)
                    delta = {"type": f"{kind}_delta", kind: choice["delta"][name]}
                    events += _event({"type": "content_block_delta", "index": self._blocks - 1, "delta": delta})
        return events

    def end(self, plain: Mapping[str, Any]) -> bytes:
        """The calls, and how the message ended."""
        events = self._closed()
        for block in plain["content"]:
            if block["type"] == "tool_use":
                events += self._opened("tool_use", {**block, "input": {}})
                delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
                events += _event({"type": "content_block_delta", "index": self._blocks - 1, "delta": delta})
                events += self._closed()
        stop = {"stop_reason": plain["stop_reason"], "stop_sequence": plain["stop_sequence"]}
        usage = {"output_tokens": plain["usage"]["output_tokens"]}
        return (
            events + _event({"type": "message_delta", "delta": stop, "usage": usage}) + _event({"type": "message_stop"})
        )

    def _begun(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        usage = {"input_tokens": len(chunk["prompt_token_ids"]), "output_tokens": 0}
        head = {"id": f"msg_{chunk['id']}", "type": "message", "role": "assistant", "model": self._model}
        return {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def _opened(self, kind: str, block: dict[str, Any] | None = None) -> bytes:
        """A block of this kind is open afterwards."""
        if self._open == kind:
            return b""
        closed = self._closed()
        block = block or {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        self._open, index, self._blocks = kind, self._blocks, self._blocks + 1
        return closed + _event({"type": "content_block_start", "index": index, "content_block": block})

    def _closed(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event({"type": "content_block_stop", "index": self._blocks - 1})


def _event(value: Mapping[str, Any]) -> bytes:
    return f"event: {value['type']}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def error(status: int, message: str) -> dict[str, Any]:
    """An error's body."""
    kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}
