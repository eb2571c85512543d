"""An HTTP server of a few lines, for what a client sends and how it takes an answer. No model is behind it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

CHOICE = {"index": 0, "text": "x", "finish_reason": "stop", "logprobs": None}
COMPLETION = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [CHOICE]}


class FakeServer:
    """Answers every request on loopback with `answer`, as an async context manager. `base_url` ends in /v1."""

    async def __aenter__(self):
        self._writers: list[asyncio.StreamWriter] = []
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    def die(self) -> None:
        """Take no connection any more, and break those that there are."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def answer(self, path: bytes, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and reply of a request."""
        raise NotImplementedError

    async def respond(self, path: bytes, body: dict[str, Any], reader, writer) -> None:
        status, reply = await self.answer(path, body)
        text = json.dumps(reply).encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n" % status)
        writer.write(b"content-length: %d\r\n\r\n" % len(text) + text)

    def gone(self) -> None:
        """A connection has ended."""

    async def _serve(self, reader, writer):
        self._writers.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                await self.respond(head.split()[1], body, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.gone()
