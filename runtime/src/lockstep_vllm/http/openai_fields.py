"""The fields that the trainer needs of each sampled choice, added to the replies of a plain OpenAI
client.

Requests to `/v1/chat/completions` and `/v1/completions` get the defaults `logprobs` on,
`return_token_ids: true` and `temperature: 1.0` where the client says nothing. Each choice of a
reply that is not a stream gets

    prompt_token_ids  list[int]
    token_ids         list[int]   what was sampled, the end-of-turn token included
    sampled_logprobs  list[float] nats, one per token; where the client asked for `logprobs`, OpenAI's objects have them
    weight_versions   [{"version": str, "start": 0, "end": n}, ...]   spans over token_ids
    sampling          {"temperature", "top_p", "top_k", "min_p", and the three penalties}   as they took effect,
                      and what else the request set that changes the distribution (a logit bias, a schema, ...)
    reply_digest      str         of a chat: binds the message's text and tool calls to token_ids (see lockstep_wire/reply_digest.py)
    routed_experts_digest  str    where vLLM sent routed experts: binds them to the choice's ids (lockstep_wire/routed_experts.py)

A chat stream that asks for its whole reply (`lockstep_wire/whole_replies.py`) gets the choices with
these fields in an event before the last. Any other stream passes through untouched apart from the
request's defaults.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lockstep_vllm.http import sampled_tokens
from lockstep_vllm.http.auth import App, Message, Receive, Scope, Send
from lockstep_vllm.http.streams import StreamEditor
from lockstep_wire import whole_replies
from lockstep_wire.http_paths import CHAT_COMPLETIONS as CHAT
from lockstep_wire.http_paths import COMPLETIONS
from lockstep_wire.reply_digest import reply_digest
from lockstep_wire.routed_experts import routed_experts_digest
from lockstep_wire.sampling import SAMPLING_DEFAULTS

CONSTRAINTS = (
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "min_tokens",
    "structured_outputs",
    "response_format",
    "tool_choice",
    "thinking_token_budget",
    "vllm_xargs",
    "watermarking",
)
"""Request settings that change which tokens can be sampled, or how likely they are; absent or
neutral as a rule.
"""
_NEUTRAL: dict[str, tuple[Any, ...]] = {"response_format": ({"type": "text"},), "tool_choice": ("auto", "none")}

_MORE_LOGPROBS = ("top_logprobs", "prompt_logprobs", "logprob_token_ids", "echo")


@dataclass
class Begun:
    """count: of the requests since the start."""

    count: int = 0


begun = Begun()
in_flight: Counter[str] = Counter()
"""Requests being served now, by the model name they asked for."""


class ChoiceFields:
    """ASGI middleware that fills in request defaults and adds the fields above to each choice."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if scope.get("method") != "POST" or path not in (CHAT, COMPLETIONS):
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive)
        request = _parsed(body)
        if request is None:  # vLLM answers a malformed body with its own error
            await self._app(scope, _replay(body, receive), send)
            return
        streamed = bool(request.get("stream"))
        pace_s = request.pop(whole_replies.FIELD, None)
        completed = streamed and path == CHAT and isinstance(pace_s, (int, float))
        listed = (completed or not streamed) and not asks_for_logprobs(request)
        add_request_defaults(request, chat=path == CHAT)
        if completed:
            request["stream_options"] = {**(request.get("stream_options") or {}), "include_usage": True}
        body = json.dumps(request).encode()
        request_id = uuid.uuid4().hex
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        headers = _with_length([*headers, (b"x-request-id", request_id.encode())], len(body))
        model = str(request.get("model"))
        in_flight[model] += 1
        begun.count += 1
        if completed:
            sampled_tokens.expect(request_id, listed=listed)
            sampled = lambda reply: add_choice_fields(reply, request, sampled_tokens.take(request_id))  # noqa: E731
            send = StreamEditor(send, sampled, pace_s)
        elif not streamed:
            sampled_tokens.expect(request_id, listed=listed)
            send = _ReplyEditor(send, request, request_id)
        try:
            await self._app(dict(scope, headers=headers), _replay(body, receive), send)
        finally:
            sampled_tokens.forget(request_id)
            in_flight[model] -= 1
            if not in_flight[model]:
                del in_flight[model]


def add_request_defaults(request: dict[str, Any], *, chat: bool) -> None:
    """Turns logprobs and token ids on and the temperature to 1.0 where the request says nothing."""
    if request.get("logprobs") is False:  # the client needs none; training does
        del request["logprobs"]
    defaults = {"logprobs": True if chat else 0, "return_token_ids": True, "temperature": 1.0}
    for name, value in defaults.items():
        if request.get(name) is None:
            request[name] = value


def asks_for_logprobs(request: dict[str, Any]) -> bool:
    """True if the client wants OpenAI's log-probabilities in the reply. `logprobs: 0` of a
    completion does, false does not.
    """
    logprobs = request.get("logprobs")
    return (logprobs is not None and logprobs is not False) or any(request.get(name) for name in _MORE_LOGPROBS)


def add_choice_fields(reply: dict[str, Any], request: dict[str, Any], sampled: list[sampled_tokens.Sampled]) -> None:
    """Adds prompt ids, log-probabilities, weight versions and sampling settings to each choice of a
    parsed reply, in place.

    sampled: what is known of each choice, in their order. If their number is not one per choice,
        vLLM did not track them (a beam search). The choices then say null, and nothing can be
        trained on them.
    """
    sampling = sampling_of(request)
    tracked = len(sampled) == len(reply["choices"])
    for position, choice in enumerate(reply["choices"]):
        token_ids = choice.get("token_ids")
        if token_ids is None:  # the client asked for a reply without them
            continue
        if choice.get("prompt_token_ids") is None:  # a chat reply has them once, at its top
            choice["prompt_token_ids"] = reply.get("prompt_token_ids")
        choice["weight_versions"] = sampled[position].spans if tracked else None
        if tracked and sampled[position].logprobs is not None:
            choice["sampled_logprobs"] = sampled[position].logprobs
        if tracked and choice.get("routed_experts") is None and sampled[position].routed_experts is not None:
            choice["routed_experts"] = sampled[position].routed_experts  # a stream's chunks have none
        choice["sampling"] = sampling
        if "message" in choice:
            choice["reply_digest"] = reply_digest(token_ids, choice["message"])
        if choice.get("routed_experts") is not None:
            choice["routed_experts_digest"] = routed_experts_digest(
                choice["prompt_token_ids"], token_ids, base64.b64decode(choice["routed_experts"])
            )


def sampling_of(request: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the sampling distribution of the request: numbers with vLLM's
    defaults filled in, and constraints.
    """
    numbers = {name: _or(request.get(name), default) for name, default in SAMPLING_DEFAULTS.items()}
    asked = {name: request[name] for name in CONSTRAINTS if request.get(name)}
    asked = {name: value for name, value in asked.items() if value not in _NEUTRAL.get(name, ())}
    return numbers | asked


class _ReplyEditor:
    """Holds a JSON reply back until it is complete, then sends it with the fields added. Errors
    pass unchanged.
    """

    def __init__(self, send: Send, request: dict[str, Any], request_id: str) -> None:
        self._send = send
        self._request = request
        self._request_id = request_id
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish(self._start)
        else:
            await self._send(message)

    async def _finish(self, start: Message) -> None:
        reply = json.loads(self._body)
        if reply is not None:  # null: what vLLM answers a client that has left
            add_choice_fields(reply, self._request, sampled_tokens.take(self._request_id))
        body = json.dumps(reply, ensure_ascii=False).encode()
        await self._send(dict(start, headers=_with_length(start["headers"], len(body))))
        await self._send({"type": "http.response.body", "body": body})


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _parsed(body: bytes) -> dict[str, Any] | None:
    try:
        request = json.loads(body)
    except ValueError:
        return None
    return request if isinstance(request, dict) else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once and then the connection's own messages (vLLM waits for
    a disconnect).
    """
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
