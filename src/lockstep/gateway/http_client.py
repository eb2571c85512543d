"""HTTP/1.1 to the run's own server, as much of it as the gateway needs: posts on kept connections.

A general client spends more CPU on a request than the whole gateway may.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

_END_OF_LINE = b"\r\n"
_LONGEST_HEAD = 1 << 16
"""Bytes of a line or of an answer's head."""


class BrokenError(Exception):
    """A connection ended, or what came is not HTTP."""


class Connections:
    """Kept connections, for one event loop."""

    def __init__(self) -> None:
        self._idle: dict[str, list[_Connection]] = {}
        self._all: set[_Connection] = set()

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, *, connect_s: float, silence_s: float
    ) -> Answer:
        """The answer, its body unread. The caller reads or closes it.

        url: http or https; the certificate is checked.
        connect_s: the longest wait for a connection. silence_s: the same for the next bytes of the answer.

        Raises BrokenError if the connection ends before the answer's head, TimeoutError, and OSError without a connection.
        """
        parts = urlsplit(url)
        head = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}", f"content-length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        connection = await self._connection(parts, connect_s)
        try:
            connection.silence_s = silence_s
            connection.send("\r\n".join([*head, "\r\n"]).encode("latin-1") + body)
            status, fields = _head(await connection.until(_END_OF_LINE * 2))
        except BaseException:
            connection.drop()
            raise
        idle = self._idle[f"{parts.scheme}://{parts.netloc}"]
        return Answer(status, fields, connection, idle)

    async def _connection(self, parts: SplitResult, connect_s: float) -> _Connection:
        idle = self._idle.setdefault(f"{parts.scheme}://{parts.netloc}", [])
        while idle:
            connection = idle.pop()
            if not connection.lost and not connection.came:
                return connection
        context = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if context else 80)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(connect_s):
            _, connection = await loop.create_connection(
                lambda: _Connection(self._all), str(parts.hostname), port, ssl=context
            )
        return connection

    def close(self) -> None:
        """End every connection."""
        for connection in list(self._all):
            connection.drop()


class Answer:
    """An answer whose head has come. status: HTTP's."""

    def __init__(self, status: int, fields: Mapping[str, str], connection: _Connection, idle: list[_Connection]):
        self.status = status
        self._connection: _Connection | None = connection
        self._idle = idle
        self._kept = fields.get("connection", "").lower() != "close"
        self._length = None if "chunked" in fields.get("transfer-encoding", "").lower() else fields["content-length"]

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([part async for part in self.parts()])

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes; what came at once is one part. Raises BrokenError where it ends too early."""
        connection = self._connection
        assert connection is not None
        if self._length is not None:
            left = int(self._length)
            while left:
                if not connection.came:
                    await connection.more()
                part = connection.take(left)
                left -= len(part)
                yield part
        else:
            while (part := await _chunks(connection)) is not None:
                yield part
        self._connection = None
        if self._kept and not connection.lost:
            self._idle.append(connection)
        else:
            connection.drop()

    def close(self) -> None:
        """Give up what was not read. Harmless after the body's end."""
        if self._connection is not None:
            self._connection.drop()


class _Connection(asyncio.Protocol):
    """Bytes that came and were not taken yet."""

    def __init__(self, everybody: set[_Connection]):
        self.lost = False
        self.silence_s = 0.0
        self.came = bytearray()
        self._everybody = everybody
        self._transport: Any = None
        self._waiting: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._everybody.add(self)

    def data_received(self, data: bytes) -> None:
        self.came += data
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.lost = True
        self._everybody.discard(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def drop(self) -> None:
        self.lost = True
        self._transport.abort()

    def take(self, count: int) -> bytes:
        """At most so many of the bytes that came."""
        taken = bytes(self.came[:count])
        del self.came[:count]
        return taken

    async def more(self) -> None:
        """Waits for further bytes, and takes none."""
        if self.lost:
            raise BrokenError("the connection ended before its answer did")
        loop = asyncio.get_running_loop()
        waiting = self._waiting = loop.create_future()
        late = loop.call_later(self.silence_s, _refuse, waiting)
        try:
            await waiting
        finally:
            late.cancel()

    async def until(self, mark: bytes) -> bytes:
        """The bytes before the mark, which is taken, too."""
        start = 0
        while (end := self.came.find(mark, start)) < 0:
            if len(self.came) > _LONGEST_HEAD:
                raise BrokenError(f"no end of a line within {_LONGEST_HEAD >> 10} KiB")
            start = max(0, len(self.came) - len(mark) + 1)
            await self.more()
        return self.take(end + len(mark))[:end]


def _refuse(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_exception(TimeoutError("nothing came in time"))


async def _chunks(connection: _Connection) -> bytes | None:
    """The data of all chunks that have come whole, at least of one; None where the last has."""
    parts: list[bytes] = []
    while True:
        came = connection.came
        end = came.find(_END_OF_LINE)
        if end < 0 or end + 2 + (size := _size(came[:end])) + 2 > len(came):
            if parts:
                return b"".join(parts)
            await connection.more()
            continue
        if not size:
            if parts:
                return b"".join(parts)
            connection.take(end + 4)
            return None
        parts.append(bytes(came[end + 2 : end + 2 + size]))
        connection.take(end + 2 + size + 2)


def _size(line: bytearray) -> int:
    try:
        return int(bytes(line).partition(b";")[0], 16)
    except ValueError:
        raise BrokenError(f"{bytes(line[:40])!r} is no length of a chunk") from None


def _head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and fields, their names in lower case. Raises BrokenError for an answer without a length."""
    try:
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split(" ", 2)[1])
    except (IndexError, ValueError):
        raise BrokenError(f"{head[:40]!r} begins no answer") from None
    if "content-length" not in fields and "transfer-encoding" not in fields:
        raise BrokenError("the answer says neither its length nor that it comes in chunks")
    return status, fields
