"""A chat stream that ends with its whole reply (`lockstep_wire/whole_replies.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lockstep_vllm.http.auth import Message, Send
from lockstep_wire.whole_replies import EVENT, StreamedReply

_DONE = b"[DONE]"
_DATA = b"data: "


class StreamEditor:
    """Passes a stream's events on as they come, and puts the whole reply before the last.

    complete: adds to the whole reply what its chunks do not have.

    An answer that is no stream, such as an error, passes unchanged. So does a stream whose reply did
    not come to its end.
    """

    def __init__(self, send: Send, complete: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._complete = complete
        self._streams = False
        self._reply = StreamedReply()
        self._rest = b""

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
                return event + b"\n\n"
            self._complete(reply)
            return _DATA + json.dumps({EVENT: reply}, ensure_ascii=False).encode() + b"\n\n" + event + b"\n\n"
        if event.startswith(_DATA):
            self._reply.add(json.loads(data))
        return event + b"\n\n"
