"""Refuses prompts of one token, which end vLLM 0.32's engine on a CPU for models with convolutions
(Qwen3.5).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from lockstep_vllm.http.auth import App, Message, Receive, Scope, Send
from lockstep_vllm.http.openai_fields import COMPLETIONS, _parsed, _read_body, _replay, _with_length

_REFUSAL = {
    "error": {
        "message": "the prompt has one token: vLLM's convolution on a CPU dies of it and would take the server with it; "
        "give at least two, or serve the model on a GPU",
        "type": "BadRequestError",
        "param": "prompt",
        "code": 400,
    }
}


class TwoTokenPrompts:
    """ASGI middleware: a completion whose prompt, or one of its prompts, has a single token gets
    status 400.

    A text is counted by the server's own `/tokenize`. Chat prompts are longer by their template.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if scope.get("method") != "POST" or path != COMPLETIONS:
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive)
        if await self._too_short(scope, _parsed(body) or {}):
            refusal = json.dumps(_REFUSAL).encode()
            headers = _with_length([(b"content-type", b"application/json")], len(refusal))
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": refusal})
            return
        await self._app(scope, _replay(body, receive), send)

    async def _too_short(self, scope: Scope, request: dict[str, Any]) -> bool:
        prompt = request.get("prompt")
        if request.get("truncate_prompt_tokens") == 1:
            return True
        several = isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt)
        for item in prompt if several else [prompt]:  # type: ignore[union-attr]
            if isinstance(item, list) and len(item) == 1:
                return True
            if isinstance(item, str) and await self._count(scope, request, item) == 1:
                return True
        return False

    async def _count(self, scope: Scope, request: dict[str, Any], text: str) -> int | None:
        """Tokens of a text as a prompt; None where the server refuses to say, and then refuses the
        request itself.
        """
        asked = {"prompt": text, "add_special_tokens": request.get("add_special_tokens", True)}
        if request.get("model") is not None:
            asked["model"] = request["model"]
        body = json.dumps(asked).encode()
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            # Nothing comes after the body: vLLM ends a request whose client it hears going, with an
            # empty answer.
            return await asyncio.get_running_loop().create_future()

        headers = _with_length([(b"content-type", b"application/json")], len(body))
        prefix = scope.get("root_path", "")
        inner = {**scope, "path": f"{prefix}/tokenize", "raw_path": f"{prefix}/tokenize".encode(), "headers": headers}
        await self._app(inner, _replay(body, receive), keep)
        if sent[0]["status"] != 200:
            return None
        return json.loads(b"".join(message.get("body", b"") for message in sent[1:]))["count"]
