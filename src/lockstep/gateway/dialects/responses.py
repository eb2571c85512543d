"""OpenAI's Responses: requests to Chat Completions and replies back, streamed or not. Nothing is stored between requests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from lockstep.gateway.messages import text_of
from lockstep.gateway.refusal import Refusal

_SAME = ("temperature", "top_p", "parallel_tool_calls", "seed", "chat_template_kwargs")


def request(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request of Chat Completions. Raises Refusal for what has no counterpart there."""
    for name in ("previous_response_id", "conversation", "background"):
        if body.get(name):
            raise Refusal(400, f"{name} needs replies that are stored, which they are not: send the whole input")
    given = body.get("input") or []
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    chat: dict[str, Any] = {"messages": messages + _messages(items)}
    chat |= {name: body[name] for name in _SAME if body.get(name) is not None}
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if body.get("tools"):
        chat["tools"] = [_tool(tool) for tool in body["tools"]]
        chat["tool_choice"] = _tool_choice(body.get("tool_choice") or "auto")
    form = (body.get("text") or {}).get("format")
    if form is not None and form.get("type") != "text":
        chat["response_format"] = _response_format(form)
    return chat


def _messages(items: list[Any]) -> list[dict[str, Any]]:
    """Thinking, text and calls that stand beside each other are one reply."""
    messages: list[dict[str, Any]] = []
    replying = False
    for item in items:
        kind = item.get("type") or "message"
        part = _reply_part(kind, item)
        if part is None:
            messages.append(_other(kind, item))
            replying = False
            continue
        opens = not replying or ("content" in part and ("content" in messages[-1] or "tool_calls" in messages[-1]))
        if opens or ("reasoning" in part and len(messages[-1]) > 1):
            messages.append({"role": "assistant"})
        calls = messages[-1].get("tool_calls", []) + part.pop("tool_calls", [])
        messages[-1] |= part | ({"tool_calls": calls} if calls else {})
        replying = True
    return messages


def _reply_part(kind: str, item: Mapping[str, Any]) -> dict[str, Any] | None:
    if kind == "message" and item.get("role") == "assistant":
        return {"content": text_of(item)}
    if kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        return {"tool_calls": [{"id": item["call_id"], "type": "function", "function": function}]}
    if kind == "reasoning":
        thought = "".join(part.get("text") or "" for part in item.get("content") or [])
        return {"reasoning": thought} if thought else {}
    return None


def _other(kind: str, item: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "message":
        return {"role": item.get("role"), "content": text_of(item)}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item["call_id"], "content": text_of({"content": item.get("output")})}
    raise Refusal(400, f"the input has an item of type {kind!r}: send messages, function calls and their outputs")


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise Refusal(400, f"a tool of type {tool.get('type')!r} runs at OpenAI: offer tools of type 'function'")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping):
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _response_format(form: Mapping[str, Any]) -> dict[str, Any]:
    if form["type"] != "json_schema":
        return dict(form)
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def reply(full: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A response of the first choice. model: the name that the client asked for."""
    choice, usage = full["choices"][0], full["usage"]
    cut = choice["finish_reason"] == "length"
    return {
        "id": f"resp_{full['id']}",
        "object": "response",
        "created_at": full["created"],
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": list(_items(full["id"], choice["message"])),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


def _items(name: str, message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    thought = message.get("reasoning") or message.get("reasoning_content")
    if thought:
        content = [{"type": "reasoning_text", "text": thought}]
        yield {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": content}
    if message.get("content") or not message.get("tool_calls"):
        text = {"type": "output_text", "text": message.get("content") or "", "annotations": [], "logprobs": []}
        done = {"status": "completed", "role": "assistant", "content": [text]}
        yield {"type": "message", "id": f"msg_{name}", **done}
    for number, call in enumerate(message.get("tool_calls") or []):
        yield {
            "type": "function_call",
            "id": f"fc_{name}_{number}",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
            "status": "completed",
        }


def events(plain: Mapping[str, Any]) -> Iterator[bytes]:
    """The response as OpenAI's events."""
    number = itertools.count()

    def event(kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": next(number), **fields}
        return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

    begun = {**plain, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for index, item in enumerate(plain["output"]):
        yield event("response.output_item.added", output_index=index, item=_opened(item))
        for kind, fields in _parts(item):
            yield event(kind, item_id=item["id"], output_index=index, **fields)
        yield event("response.output_item.done", output_index=index, item=item)
    yield event(f"response.{plain['status']}", response=plain)


def _opened(item: Mapping[str, Any]) -> dict[str, Any]:
    if item["type"] == "function_call":
        return {**item, "arguments": "", "status": "in_progress"}
    return {**item, "content": []} | ({"status": "in_progress"} if "status" in item else {})


def _parts(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if item["type"] == "function_call":
        yield "response.function_call_arguments.delta", {"delta": item["arguments"]}
        yield "response.function_call_arguments.done", {"arguments": item["arguments"], "name": item["name"]}
        return
    (part,) = item["content"]
    kind, place = part["type"], {"content_index": 0}
    more = {"logprobs": []} if kind == "output_text" else {}
    yield "response.content_part.added", {**place, "part": {**part, "text": ""}}
    yield f"response.{kind}.delta", {**place, "delta": part["text"], **more}
    yield f"response.{kind}.done", {**place, "text": part["text"], **more}
    yield "response.content_part.done", {**place, "part": part}
