"""A bearer token on every endpoint.

vLLM's own `--api-key` guards `/v1`, `/v2` and `/inference` only. It leaves the control endpoints
(pause, weight update, adapters' aliases, metrics) open to anybody who can reach the port.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_VARIABLE = "LOCKSTEP_SERVER_TOKEN"
_REFUSAL = b'{"error":{"message":"missing or wrong bearer token","type":"unauthorized","code":401}}'


class BearerAuth:
    """ASGI middleware: refuses every HTTP request and websocket without the token, whatever its
    path or method.

    It takes the token from `LOCKSTEP_SERVER_TOKEN`; a server without one does not start.
    """

    def __init__(self, app: App) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        if len(token) < 16:
            raise RuntimeError(f"{TOKEN_VARIABLE} must hold this server's token (16 characters or more)")
        self._app = app
        self._expected = b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._authorized(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "missing or wrong bearer token"})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_REFUSAL)).encode())]
            await send(
                {"type": "http.response.start", "status": 401, "headers": [*headers, (b"www-authenticate", b"Bearer")]}
            )
            await send({"type": "http.response.body", "body": _REFUSAL})

    def _authorized(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(values) == 1 and hmac.compare_digest(values[0], self._expected)
