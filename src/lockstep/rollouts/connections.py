"""Connections to a server for many requests at once, each found in constant time.

The pool of httpx looks at every connection and asks the system about each idle one, at every
request's start and end. With 512 requests under way this is half of what a client computes. Here
each connection has a pool of its own, and a free one is taken from a stack, one for each server.
"""

from __future__ import annotations

import ssl
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

from lockstep.rollouts.router import Replica


def connections_for(client_class: type) -> Any:
    """A transport for `client_class`, an async client of httpx or of its successor, which openai
    builds upon.
    """
    library = _library_of(client_class)
    context = ssl.create_default_context()  # made once: reading the certificates takes longer than a request
    limits = library.Limits(max_connections=1, max_keepalive_connections=1)

    class Connections(library.AsyncBaseTransport):
        def __init__(self) -> None:
            self._idle: defaultdict[str, list[Any]] = defaultdict(list)
            self._all: list[Any] = []

        async def handle_async_request(self, request: Any) -> Any:
            idle = self._idle[f"{request.url.host}:{request.url.port}"]
            connection = idle.pop() if idle else self._open()
            try:
                response = await connection.handle_async_request(request)
            except BaseException:
                idle.append(connection)  # the pool of one has closed what failed
                raise
            response.stream = Stream(response.stream, idle, connection)
            return response

        def _open(self) -> Any:
            connection = library.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits)
            self._all.append(connection)
            return connection

        async def aclose(self) -> None:
            connections, self._all = self._all, []
            self._idle.clear()
            for connection in connections:
                await connection.aclose()

    class Stream(library.AsyncByteStream):
        """A reply's bytes; its end gives the connection back."""

        def __init__(self, stream: Any, idle: list[Any], connection: Any) -> None:
            self._stream, self._idle, self._connection = stream, idle, connection

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for part in self._stream:
                yield part

        async def aclose(self) -> None:
            connection, self._connection = self._connection, None
            await self._stream.aclose()
            if connection is not None:
                self._idle.append(connection)

    return Connections()


def _library_of(client_class: type) -> Any:
    """The module that defines the client's base, `AsyncClient`."""
    base = next(base for base in client_class.__mro__ if base.__name__ == "AsyncClient")
    return sys.modules[base.__module__.partition(".")[0]]


def redirect(request: Any, replica: Replica) -> None:
    """Send a request that was built for another server to this one."""
    to = type(request.url)(replica.base_url)
    request.url = request.url.copy_with(scheme=to.scheme, netloc=to.netloc)
    request.headers["host"] = to.netloc.decode("ascii")
    request.headers["authorization"] = f"Bearer {replica.api_key}"


def is_broken(error: BaseException) -> bool:
    """Whether a server ended the connection, or took none; of httpx or its successor."""
    return any(kind.__name__ in ("NetworkError", "RemoteProtocolError") for kind in type(error).__mro__)
