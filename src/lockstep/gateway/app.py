"""The gateway's paths: who may call, what a body may be, and which client API answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lockstep.gateway.calls import Attempt, OpenEpisode
from lockstep.gateway.dialects import chat, messages, responses
from lockstep.gateway.messages import plain
from lockstep.gateway.refusal import Refusal
from lockstep.gateway.upstream import Upstream

if TYPE_CHECKING:
    from starlette.requests import Request

LARGEST_BODY = 32 << 20
"""Bytes of a request."""
PING_S = 10.0
"""Between two signs of life in a stream in which nothing comes."""

Find = Callable[[str], OpenEpisode | None]


@dataclass(frozen=True)
class _Dialect:
    """Of a client API: its request as a chat request, its reply, its stream, its errors, and a sign of life in a stream."""

    request: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    reply: Callable[[Mapping[str, Any], str], dict[str, Any]]
    stream: Callable[[str, Mapping[str, Any]], _Stream]
    error: Callable[[int, str], dict[str, Any]]
    ping: bytes


class _Stream(Protocol):
    """Writes the events of one reply."""

    def chunk(self, chunk: Mapping[str, Any]) -> bytes: ...
    def end(self, plain: Mapping[str, Any]) -> bytes: ...


CHAT = _Dialect(lambda body: body, chat.reply, chat.Stream, chat.error, b": waiting\n\n")
MESSAGES = _Dialect(messages.request, messages.reply, messages.Stream, messages.error, messages.PING)
RESPONSES = _Dialect(responses.request, responses.reply, responses.Stream, chat.error, CHAT.ping)


def application(find: Find, upstream: Upstream) -> Any:
    """The ASGI app. find: the open episode of a key, compared in constant time."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    async def completions(request: Request) -> Any:
        return await _sampled(CHAT, request, find, upstream)

    async def create_response(request: Request) -> Any:
        return await _sampled(RESPONSES, request, find, upstream)

    async def create_message(request: Request) -> Any:
        return await _sampled(MESSAGES, request, find, upstream)

    async def count_tokens(request: Request) -> Any:
        return await _counted(request, find, upstream)

    async def models(request: Request) -> Any:
        return await _models(request, find)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/v1/responses", create_response, methods=["POST"]),
            Route("/v1/messages", create_message, methods=["POST"]),
            Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
        ]
    )


async def _sampled(dialect: _Dialect, request: Request, find: Find, upstream: Upstream) -> Any:
    from starlette.responses import JSONResponse

    try:
        episode = _episode(request, find)
        body = await _body(request)
        asked = _translated(dialect, body)
        gone = asyncio.Event()
        again = request.headers.get("x-stainless-retry-count", "0") not in ("", "0")
        stream = bool(body.get("stream"))
        attempt = episode.attempt(upstream, asked, again=again, stream=stream)
        watching = asyncio.ensure_future(_watch(request, gone, attempt))
        attempt.task.add_done_callback(lambda _: watching.cancel())
        model = str(body.get("model") or episode.terms.name)
        if not stream:
            return JSONResponse(dialect.reply(await episode.answer(attempt, gone), model))
        await attempt.chunks(0, PING_S)
        if attempt.failed:  # before anything was sent: an error as without a stream
            attempt.task.result()
        events = _events(dialect, episode, attempt, gone, dialect.stream(model, body), model)
        return _streaming(events)
    except Refusal as refusal:
        return JSONResponse(dialect.error(refusal.status, str(refusal)), refusal.status)


def _streaming(events: AsyncIterator[bytes]) -> Any:
    """The ASGI app of a stream. Starlette's own has a group of tasks to watch the client, who is watched already."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for part in events:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return answer


async def _events(
    dialect: _Dialect, episode: OpenEpisode, attempt: Attempt, gone: asyncio.Event, stream: _Stream, model: str
) -> AsyncIterator[bytes]:
    """The reply as it comes, with signs of life where nothing does."""
    taken = 0
    with episode.waits_for(attempt, gone):
        while not gone.is_set():
            chunks = await attempt.chunks(taken, PING_S)
            taken += len(chunks)
            if events := b"".join(map(stream.chunk, chunks)):
                yield events
            elif not chunks and attempt.task.done():
                break
            elif not chunks:
                yield dialect.ping
        if gone.is_set():
            return
        try:
            yield stream.end(dialect.reply(attempt.task.result(), model))
        except Refusal as refusal:
            yield f"event: error\ndata: {json.dumps(dialect.error(refusal.status, str(refusal)))}\n\n".encode()


def _translated(dialect: _Dialect, body: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        asked = {**dialect.request(body), "model": body.get("model")}
        for message in asked.get("messages") or []:
            plain(message)  # a refusal comes before anything is sampled, and before a stream begins
    except (KeyError, TypeError, AttributeError) as error:
        raise Refusal(400, f"the request is malformed: {type(error).__name__} {error}") from None
    return asked


async def _counted(request: Request, find: Find, upstream: Upstream) -> Any:
    from starlette.responses import JSONResponse

    try:
        episode = _episode(request, find)
        asked = _translated(MESSAGES, await _body(request))
        body = {name: asked[name] for name in ("messages", "tools") if asked.get(name)}
        count = await upstream.count(episode.terms.address(), {**body, "model": episode.terms.name})
    except Refusal as refusal:
        return JSONResponse(messages.error(refusal.status, str(refusal)), refusal.status)
    return JSONResponse({"input_tokens": count})


async def _models(request: Request, find: Find) -> Any:
    from starlette.responses import JSONResponse

    try:
        episode = _episode(request, find)
    except Refusal as refusal:
        return JSONResponse(chat.error(refusal.status, str(refusal)), refusal.status)
    return JSONResponse(
        {"object": "list", "data": [{"id": episode.terms.name, "object": "model", "owned_by": "lockstep"}]}
    )


def _episode(request: Request, find: Find) -> OpenEpisode:
    given = [request.headers[name] for name in ("x-api-key", "authorization") if name in request.headers]
    episodes = [find(value.removeprefix("Bearer ")) for value in given]
    if (
        not episodes
        or any(episode is None or episode is not episodes[0] for episode in episodes)
        or episodes[0] is None
    ):
        raise Refusal(401, "no open episode has this key: use episode.api_key, before the episode ends")
    return episodes[0]


async def _body(request: Request) -> dict[str, Any]:
    size, parts = 0, []
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise Refusal(413, f"the body has more than {LARGEST_BODY >> 20} MiB: send a shorter history")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError):  # text that is not JSON, or JSON that is nested too deeply
        raise Refusal(400, "the body is not JSON that can be read") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object")
    return body


async def _watch(request: Request, gone: asyncio.Event, attempt: Attempt) -> None:
    """Sets `gone` when the client leaves."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()
        attempt.tell()
