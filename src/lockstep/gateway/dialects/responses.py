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
    return _response(full, model) | {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": list(_items(full["id"], choice["message"])),
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


def _response(full: Mapping[str, Any], model: str) -> dict[str, Any]:
    """What a response has from its beginning."""
    return {
        "id": f"resp_{full['id']}",
        "object": "response",
        "created_at": full["created"],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def _items(name: str, message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    thought = message.get("reasoning") or message.get("reasoning_content")
    if thought:
        content = [{"type": "reasoning_text", "text": thought}]
        yield {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": content}
    if message.get("content") or not message.get("tool_calls"):
        text = _part("output_text", message.get("content") or "")
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


_LIVE = {"reasoning": ("reasoning", "reasoning_text", "rs"), "content": ("message", "output_text", "msg")}
"""Of a chunk's field: the item that it belongs to, its part, and the prefix of its name."""


class Stream:
    """The response as OpenAI's events: thinking and text as they come, a call once its arguments are whole."""

    def __init__(self, model: str, body: Mapping[str, Any]):
        del body
        self._model = model
        self._numbers = itertools.count()
        self._items: list[str] = []  # names of the items that were opened, in their order

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        """The events of one of the server's chunks; those of further choices are not shown."""
        events = b""
        if chunk.get("prompt_token_ids") is not None:
            begun = _response(chunk, self._model) | {"status": "in_progress", "output": [], "usage": None}
            events += self._event("response.created", response=begun)
            events += self._event("response.in_progress", response=begun)
        for choice in chunk["choices"]:
            for name, (item, part, prefix) in _LIVE.items():
                delta = choice["delta"].get(name) if choice["index"] == 0 else None
                if delta:
                    events += self._delta(item, part, f"{prefix}_{chunk['id']}", delta)
        return events

    def end(self, plain: Mapping[str, Any]) -> bytes:
        """What is left of each item, and the whole response with its items in the order of the stream."""
        place = {name: index for index, name in enumerate(self._items)}
        items = sorted(plain["output"], key=lambda item: place.get(item["id"], len(place)))
        events = b""
        for index, item in enumerate(items):
            where = {"item_id": item["id"], "output_index": index}
            if item["id"] not in place:
                events += self._event("response.output_item.added", output_index=index, item=_opened(item))
                events += b"".join(self._event(kind, **where, **fields) for kind, fields in _begun_parts(item))
            events += b"".join(self._event(kind, **where, **fields) for kind, fields in _ended_parts(item))
            events += self._event("response.output_item.done", output_index=index, item=item)
        response = {**plain, "output": items}
        return events + self._event(f"response.{plain['status']}", response=response)

    def _delta(self, item: str, part: str, name: str, delta: str) -> bytes:
        events = b""
        if name not in self._items:
            self._items.append(name)
            empty: dict[str, Any] = {"type": item, "id": name, "content": []}
            empty |= {"summary": []} if item == "reasoning" else {"role": "assistant", "status": "in_progress"}
            index = len(self._items) - 1
            events += self._event("response.output_item.added", output_index=index, item=empty)
            where = {"item_id": name, "output_index": index, "content_index": 0}
            events += self._event("response.content_part.added", **where, part=_part(part, ""))
        where = {"item_id": name, "output_index": self._items.index(name), "content_index": 0}
        return events + self._event(f"response.{part}.delta", **where, delta=delta, **_no_logprobs(part))

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": next(self._numbers), **fields}
        return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _opened(item: Mapping[str, Any]) -> dict[str, Any]:
    if item["type"] == "function_call":
        return {**item, "arguments": "", "status": "in_progress"}
    return {**item, "content": []} | ({"status": "in_progress"} if "status" in item else {})


def _begun_parts(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The beginning of an item of which nothing was streamed."""
    if item["type"] == "function_call":
        yield "response.function_call_arguments.delta", {"delta": item["arguments"]}
        return
    (part,) = item["content"]
    yield "response.content_part.added", {"content_index": 0, "part": {**part, "text": ""}}


def _ended_parts(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if item["type"] == "function_call":
        yield "response.function_call_arguments.done", {"arguments": item["arguments"], "name": item["name"]}
        return
    (part,) = item["content"]
    done = {"content_index": 0, "text": part["text"], **_no_logprobs(part["type"])}
    yield f"response.{part['type']}.done", done
    yield "response.content_part.done", {"content_index": 0, "part": part}


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {}) | _no_logprobs(kind)


def _no_logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "output_text" else {}
