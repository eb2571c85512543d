"""A chat stream that ends with its whole reply (`lockstep_wire/whole_replies.py`)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from lockstep_vllm.http.auth import Message, Send
from lockstep_wire.whole_replies import EVENT, StreamedReply, join

_DONE = b"[DONE]"
_DATA = b"data: "


class StreamEditor:
    """Passes a stream's events on, and puts the whole reply before the last.

    complete: adds to the whole reply what its chunks do not have.
    pace_s: seconds between two events; what comes meanwhile is joined. 0: each event as it comes.

    An answer that is no stream, such as an error, passes unchanged. A stream whose reply did not come to its end brings
    no whole reply.
    """

    def __init__(self, send: Send, complete: Callable[[dict[str, Any]], None], pace_s: float = 0.0) -> None:
        self._send = send
        self._complete = complete
        self._pace_s = pace_s
        self._streams = False
        self._reply = StreamedReply()
        self._rest = b""
        self._pending: list[dict[str, Any]] = []
        self._next = 0.0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = message["status"] == 200 and kind.startswith(b"text/event-stream")
        if not self._streams or message["type"] != "http.response.body":
            await self._send(message)
            return
        *events, self._rest = (self._rest + message.get("body", b"")).split(b"\n\n")
        more = bool(message.get("more_body", False))
        if not more and self._rest:
            events.append(self._rest)
        body = b"".join(self._passed(event) for event in events)
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _passed(self, event: bytes) -> bytes:
        data = event.strip().removeprefix(_DATA)
        if data == _DONE:
            reply = self._reply.completed()
            if reply is None:
                return self._released() + event + b"\n\n"
            self._complete(reply)
            return self._released() + _event({EVENT: reply}) + event + b"\n\n"
        if not event.startswith(_DATA):
            return event + b"\n\n"
        chunk = json.loads(data)
        self._reply.add(chunk)
        now = time.monotonic()
        if not self._pending and now >= self._next:
            self._next = now + self._pace_s
            return event + b"\n\n"
        join(self._pending, chunk)
        if now < self._next and chunk.get("choices"):
            return b""
        self._next = now + self._pace_s
        return self._released()

    def _released(self) -> bytes:
        pending, self._pending = self._pending, []
        return b"".join(map(_event, pending))


def _event(value: dict[str, Any]) -> bytes:
    return _DATA + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
