"""Chat requests that differ in their seed alone, served as one (`lockstep_wire/siblings.py`).

vLLM checks and renders the request once. Each sibling then goes through vLLM's own serving. At
short replies, taking an HTTP request and answering it costs more than all else that the API
process does for the request.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import copy
import logging
import os
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from lockstep_vllm.http import sampled_tokens, tools_off
from lockstep_vllm.http.openai_fields import (
    add_choice_fields,
    add_request_defaults,
    asks_for_logprobs,
    begun,
    in_flight,
)
from lockstep_wire import http_paths, siblings

logger = logging.getLogger("vllm.lockstep")

_UNLIKE_SIBLINGS = ("stream", "seed", "use_beam_search")


class _Rendered:
    """A request that vLLM has checked and rendered, to be sampled several times."""

    def __init__(self, serving: Any, body: dict[str, Any], request: Any, prompt: Any, *, listed: bool):
        self._serving, self._body, self._request, self._listed = serving, body, request, listed
        self._conversation, self._inputs = prompt

    async def sample(self, seed: int | None) -> dict[str, Any] | None:
        """The reply, with the fields that training needs; None if the sibling failed."""
        identity = uuid.uuid4().hex
        sampled_tokens.expect(identity, listed=self._listed)
        try:
            serving = copy.copy(self._serving)
            serving.render_chat_request = self._render
            sibling = self._request.model_copy(update={"seed": seed, "request_id": identity})
            reply = await serving.create_chat_completion(sibling)
            if not hasattr(reply, "choices"):  # vLLM's error
                return None
            fields = reply.model_dump()
            add_choice_fields(fields, self._body, sampled_tokens.take(identity))
            return fields
        except Exception:
            logger.exception("a sibling failed; its client asks for it alone")
            return None
        finally:
            sampled_tokens.forget(identity)

    async def _render(self, request: Any) -> Any:
        return self._conversation, [copy.copy(each) for each in self._inputs]


async def _lines(rendered: _Rendered, seeds: list[int | None], model: str) -> AsyncIterator[bytes]:
    """The lines of replies as they end. A client that leaves ends the rest."""
    in_flight[model] += len(seeds)
    begun.count += len(seeds)
    tasks = {asyncio.create_task(rendered.sample(seed)): position for position, seed in enumerate(seeds)}
    waiting = set(tasks)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            in_flight[model] -= len(done)
            yield b"".join(siblings.line(tasks[task], task.result()) for task in done)
    finally:
        for task in waiting:
            task.cancel()
        in_flight[model] -= len(waiting)
        if not in_flight[model]:
            del in_flight[model]


def _refusal(message: str, status: int = 400) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)


def add_endpoint(app: FastAPI) -> None:
    """Adds the endpoint. It refuses what cannot be siblings; such requests are sent alone."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    @app.post(http_paths.SIBLINGS)
    async def sample_siblings(
        request: Annotated[dict[str, Any], Body()],
        seeds: Annotated[list[int | None], Body(min_length=1, max_length=siblings.MOST)],
        raw: Request,
    ) -> Response:
        if request.get("n") not in (None, 1) or any(request.get(name) for name in _UNLIKE_SIBLINGS):
            return _refusal("siblings have one choice each, no stream, no beams, and their seeds beside the request")
        if tools_off.offers_tools(request) and (reason := os.environ.get(tools_off.REASON_VARIABLE)):
            return _refusal(reason)
        listed = not asks_for_logprobs(request)
        add_request_defaults(request, chat=True)
        try:
            checked = ChatCompletionRequest(**request)
        except ValidationError as error:
            return _refusal(str(error))
        serving = raw.app.state.openai_serving_chat
        prompt = await serving.render_chat_request(checked)
        if not isinstance(prompt, tuple):  # vLLM's error
            return JSONResponse(prompt.model_dump(), prompt.error.code)
        rendered = _Rendered(serving, request, checked, prompt, listed=listed)
        lines = _lines(rendered, seeds, str(request.get("model")))
        return StreamingResponse(lines, media_type="application/x-ndjson")
