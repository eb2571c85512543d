"""An OpenAI-compatible endpoint on loopback, in a thread of its own, for samplers that have none.
Every endpoint wants the run's token.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from lockstep.backends.base import Endpoint
from lockstep.config import deadlines
from lockstep.errors import ConfigError, ServerError

Answer = Callable[[bytes], Awaitable[dict[str, Any]]]


class RequestError(Exception):
    """A request that gets an error as its answer, in one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class ChatEndpoint:
    """Serves `POST /v1/chat/completions` with `answer(body)` and `GET /v1/models` with `models()`.

    `answer` runs in the endpoint's own event loop and raises RequestError for what it refuses.
    """

    def __init__(self, answer: Answer, models: Callable[[], list[str]]):
        self._answer, self._models = answer, models
        self._token = secrets.token_urlsafe(32)
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.endpoint: Endpoint | None = None

    def start(self) -> Endpoint:
        """Listen on a free loopback port; returns when it answers. Raises ConfigError without its
        packages, or ServerError.
        """
        try:
            import uvicorn
        except ModuleNotFoundError as error:
            raise ConfigError(f"the endpoint needs {error.name}: pip install lockstep-rl[tinker]") from None
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        settings = uvicorn.Config(
            self._application(),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="lockstep-chat-endpoint", daemon=True
        )
        self._thread.start()
        end = time.monotonic() + deadlines.ENDPOINT_START_S
        while not self._server.started:
            if time.monotonic() > end or not self._thread.is_alive():
                raise ServerError(f"the chat endpoint did not start within {deadlines.ENDPOINT_START_S:g} s")
            time.sleep(0.01)
        self.endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", self._token)
        return self.endpoint

    def close(self) -> None:
        """Stop listening; requests in flight get a few seconds. Harmless when it never started."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(deadlines.ENDPOINT_CLOSE_S)

    def _application(self) -> Any:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        expected = f"Bearer {self._token}".encode()

        def refused(status: int, message: str) -> JSONResponse:
            return JSONResponse({"error": {"message": message, "type": "error", "code": status}}, status)

        async def completions(request: Request) -> JSONResponse:
            try:
                return JSONResponse(await self._answer(await request.body()))
            except RequestError as error:
                return refused(error.status, str(error))

        async def models(request: Request) -> JSONResponse:
            return JSONResponse(
                {"object": "list", "data": [{"id": name, "object": "model"} for name in self._models()]}
            )

        app = Starlette(
            routes=[
                Route("/v1/chat/completions", completions, methods=["POST"]),
                Route("/v1/models", models, methods=["GET"]),
            ]
        )

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            known = len(given) == 1 and hmac.compare_digest(given[0], expected)
            await (app if known else refused(401, "missing or wrong bearer token"))(scope, receive, send)

        return guarded
