"""The gateway's server: on loopback, in a thread with an event loop of its own, so that neither side can stall the other."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from lockstep.config import deadlines
from lockstep.errors import ConfigError, ServerError
from lockstep.gateway.app import application
from lockstep.gateway.calls import OpenEpisode, Terms
from lockstep.gateway.episode import Captured, Episode
from lockstep.gateway.upstream import Upstream


class Gateway:
    """Gives out episodes of one model and answers their calls. Starts at once; `close` ends it."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[bytes, OpenEpisode]] = {}
        self._numbers = itertools.count()
        self._server: Any = None
        self._failure: BaseException | None = None
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.root_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, name="lockstep-gateway", daemon=True)
        self._start()

    def episode(self, terms: Terms, on_end: Callable[[], None]) -> Episode:
        """An episode that is answered by these terms. on_end: called once, when it ends."""
        number = next(self._numbers)
        handle, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        captured = Captured()
        opened = OpenEpisode(number, terms, captured)
        self._open[handle] = (_digest(secret), opened)

        def end() -> None:
            if self._open.pop(handle, None) is not None:
                with captured.lock:
                    opened.ended = True
                on_end()

        return Episode(self.root_url, f"ls-{handle}-{secret}", terms.name, captured, end)

    def close(self) -> None:
        """Stop answering; every key is dead. Harmless when it has ended."""
        self._open.clear()
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(deadlines.ENDPOINT_CLOSE_S)

    def _find(self, key: str) -> OpenEpisode | None:
        prefix, _, rest = key.partition("-")
        handle, _, secret = rest.partition("-")
        digest, episode = self._open.get(handle, (b"", None))
        known = hmac.compare_digest(_digest(secret), digest) and prefix == "ls"
        return episode if known else None

    def _start(self) -> None:
        self._thread.start()
        end = time.monotonic() + deadlines.ENDPOINT_START_S
        while self._server is None or not self._server.started:
            if time.monotonic() > end or not self._thread.is_alive():
                if isinstance(self._failure, ModuleNotFoundError):
                    raise ConfigError(f"episodes need {self._failure.name}: pip install lockstep-rl") from None
                raise ServerError(f"the gateway did not start within {deadlines.ENDPOINT_START_S:g} s: {self._failure}")
            time.sleep(0.005)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except (Exception, SystemExit) as error:  # noqa: BLE001  whoever waits for the start names it
            self._failure = error

    async def _serve(self) -> None:
        import uvicorn

        upstream = Upstream()
        settings = uvicorn.Config(
            application(self._find, upstream),
            http="auto",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        server = uvicorn.Server(settings)
        self._server = server
        try:
            await server.serve(sockets=[self._listener])
        finally:
            upstream.close()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
