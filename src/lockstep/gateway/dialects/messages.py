"""Anthropic's Messages: requests to Chat Completions and replies back, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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


def events(plain: Mapping[str, Any]) -> Iterator[bytes]:
    """The message as Anthropic's events."""
    usage = plain["usage"]
    start = {**plain, "content": [], "stop_reason": None, "stop_sequence": None, "usage": {**usage, "output_tokens": 0}}
    yield _event({"type": "message_start", "message": start})
    for index, block in enumerate(plain["content"]):
        empty, deltas = _opened(block)
        yield _event({"type": "content_block_start", "index": index, "content_block": empty})
        for delta in deltas:
            yield _event({"type": "content_block_delta", "index": index, "delta": delta})
        yield _event({"type": "content_block_stop", "index": index})
    stop = {"stop_reason": plain["stop_reason"], "stop_sequence": plain["stop_sequence"]}
    yield _event({"type": "message_delta", "delta": stop, "usage": {"output_tokens": usage["output_tokens"]}})
    yield _event({"type": "message_stop"})


def _opened(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if block["type"] == "text":
        return {"type": "text", "text": ""}, [{"type": "text_delta", "text": block["text"]}]
    if block["type"] == "thinking":
        return {"type": "thinking", "thinking": "", "signature": ""}, [
            {"type": "thinking_delta", "thinking": block["thinking"]}
        ]
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]


def _event(value: Mapping[str, Any]) -> bytes:
    return f"event: {value['type']}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def error(status: int, message: str) -> dict[str, Any]:
    """An error's body."""
    kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}
