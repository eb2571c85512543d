"""The run's own servers, as the gateway sees them: one pool of connections and as many requests as a server takes at once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from lockstep.config import deadlines
from lockstep.gateway.http_client import Answer, BrokenError, Connections
from lockstep.gateway.refusal import Refusal
from lockstep.rollouts.slots import Slots, choices_of, token_limit
from lockstep_wire.http_paths import CHAT_COMPLETIONS
from lockstep_wire.whole_replies import EVENT, FIELD

_TRIES = 4
"""Of a request whose connection breaks before the server answers."""
PACE_S = 0.5
"""Between two events of a stream. An event costs as much CPU as a tenth of a call."""


class Address(Protocol):
    """The address of a server, its bearer token, and how much the server takes at once. A backend's
    `Endpoint` has all four fields.
    """

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    @property
    def slots(self) -> int | None: ...
    @property
    def max_model_len(self) -> int | None: ...


class Upstream:
    """Sends requests to the server; for one event loop. The server may change its address from one call to the next."""

    def __init__(self) -> None:
        self._connections = Connections()
        self._slots: dict[tuple[str, int], Slots] = {}

    def close(self) -> None:
        """End every connection."""
        self._connections.close()

    async def complete(self, address: Address, body: dict[str, Any], *, under_way: bool) -> dict[str, Any]:
        """The reply to a chat request. under_way: its episode goes before those that have not begun.

        Raises Refusal with the server's own status and text, and with 502 if the server can't be reached.
        """
        return await self._post(address, CHAT_COMPLETIONS, body, places=choices_of(body), under_way=under_way)

    async def stream(
        self, address: Address, body: dict[str, Any], taken: Callable[[dict[str, Any]], None], *, under_way: bool
    ) -> dict[str, Any]:
        """The whole reply to a chat request. taken: called with its chunks, at most one each PACE_S.

        Raises Refusal as `complete` does, and with 502 if the stream ends before the reply does.
        """
        body, reply = {**body, "stream": True, FIELD: PACE_S}, None
        places = choices_of(body)
        async with (
            self._place(address, places, under_way=under_way),
            self._answer(address, CHAT_COMPLETIONS, body) as sent,
        ):
            async for line in _lines(sent):
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise Refusal(int(event["error"].get("code") or 500), str(event["error"].get("message")))
                if EVENT in event:
                    reply = event[EVENT]
                else:
                    taken(event)
        if reply is None:
            raise Refusal(502, "the run's server ended a stream before the reply's end")
        return reply

    @asynccontextmanager
    async def _answer(self, address: Address, path: str, body: dict[str, Any]) -> AsyncIterator[Answer]:
        """The server's answer with status 200, its body unread. Raises Refusal for any other, and where there is none."""
        try:
            answer = await self._sent(address, path, body)
            try:
                if answer.status != 200:
                    raise Refusal(answer.status, _message(await answer.body(), answer.status))
                yield answer
            finally:
                answer.close()
        except (BrokenError, OSError) as error:
            raise Refusal(502, f"the run's server gave no reply: {type(error).__name__} {error}") from None

    async def _sent(self, address: Address, path: str, body: dict[str, Any]) -> Answer:
        """The beginning of the answer. A server may close an idle connection just as it is used: then another is opened."""
        seconds = deadlines.REQUEST_S + token_limit(body, address.max_model_len or 0)
        url = path if path.startswith("http") else address.base_url.removesuffix("/v1") + path
        headers = {"authorization": f"Bearer {address.api_key}", "content-type": "application/json"}
        written = json.dumps(body).encode()
        for left in reversed(range(_TRIES)):
            try:
                return await self._connections.post(
                    url, headers, written, connect_s=deadlines.CONNECT_S, silence_s=seconds
                )
            except BrokenError:
                if not left:
                    raise
        raise AssertionError

    @asynccontextmanager
    async def _place(self, address: Address, places: int, *, under_way: bool) -> AsyncIterator[None]:
        """As many of the server's places as a request has choices, once they are free."""
        slots = None
        if places and address.slots is not None:
            slots = self._slots.setdefault((address.base_url, address.slots), Slots(address.slots))
        taken = 0 if slots is None else await slots.take(places, under_way=under_way)
        try:
            yield
        finally:
            if slots is not None:
                slots.give_back(taken)

    async def elsewhere(self, address: Address, body: dict[str, Any]) -> dict[str, Any]:
        """Another server's reply to a chat request. Raises Refusal as `complete` does."""
        async with self._answer(address, address.base_url.rstrip("/") + "/chat/completions", body) as sent:
            return json.loads(await sent.body())

    async def count(self, address: Address, body: dict[str, Any]) -> int:
        """How many tokens a conversation has as a prompt."""
        return (await self._post(address, "/tokenize", body, places=0, under_way=True))["count"]

    async def _post(
        self, address: Address, path: str, body: dict[str, Any], *, places: int, under_way: bool
    ) -> dict[str, Any]:
        async with self._place(address, places, under_way=under_way), self._answer(address, path, body) as sent:
            return json.loads(await sent.body())


async def _lines(answer: Answer) -> AsyncIterator[bytes]:
    rest = b""
    async for part in answer.parts():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace") or f"the run's server answered {status}"
