"""Refuses requests that offer tools where no parser reads the calls, with the reason and what
helps.

vLLM's own refusal names two of its command-line flags, which nobody here has set.
"""

from __future__ import annotations

import json
import os
from typing import Any

from lockstep_vllm.http.auth import App, Receive, Scope, Send
from lockstep_vllm.http.openai_fields import CHAT, _parsed, _read_body, _replay, _with_length

REASON_VARIABLE = "LOCKSTEP_TOOLS_OFF"
_PATHS = (CHAT, "/v1/responses", "/v1/messages")


def offers_tools(request: dict[str, Any]) -> bool:
    """True if the model may call a tool of the request."""
    return bool(request.get("tools")) and request.get("tool_choice") not in ("none", {"type": "none"})


class ToolsOff:
    """ASGI middleware: a request with tools gets status 400 and the text of `LOCKSTEP_TOOLS_OFF`,
    unless its tool_choice is none.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        error = {"message": os.environ[REASON_VARIABLE], "type": "BadRequestError", "param": "tools", "code": 400}
        self._refusal = json.dumps({"error": error}).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if scope.get("method") != "POST" or path not in _PATHS:
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive)
        request = _parsed(body) or {}
        if offers_tools(request):
            headers = _with_length([(b"content-type", b"application/json")], len(self._refusal))
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": self._refusal})
            return
        await self._app(scope, _replay(body, receive), send)
