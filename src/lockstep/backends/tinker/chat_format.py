"""Chat completions from token ids: a request to a prompt, and sampled tokens to the choices that
our own server would give.

The choices carry what the trainer needs (`prompt_token_ids`, `token_ids`, `weight_versions`,
`sampling`), under the names that `lockstep_vllm.http.openai_fields` uses.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lockstep.backends.tinker.chat_server import RequestError
from lockstep.config.messages import describe
from lockstep_wire.sampling import SAMPLING_DEFAULTS

_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


class ChatRequest(BaseModel):
    """The fields of a chat completion that are understood; any other is refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    max_tokens: int | None = Field(default=None, gt=0)
    max_completion_tokens: int | None = Field(default=None, gt=0)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    n: int | None = Field(default=None, gt=0)
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: Literal[True] | None = None
    return_token_ids: Literal[True] | None = None
    stream: Literal[False] | None = None

    @classmethod
    def read(cls, body: bytes) -> ChatRequest:
        """Raises RequestError naming the first field that is unknown or wrong."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise RequestError(400, describe(error, cls, "the request")) from None

    @property
    def sampling(self) -> dict[str, float]:
        """The settings that decide how tokens are drawn, as they take effect."""
        asked = {"temperature": self.temperature, "top_p": self.top_p}
        given = {setting: value for setting, value in asked.items() if value is not None}
        return SAMPLING_DEFAULTS | given | {"top_k": max(self.top_k or 0, 0)}


def render(request: ChatRequest, tokenizer: Any) -> list[int]:
    """The prompt's token ids, from the tokenizer's chat template. Raises RequestError for messages
    it can't render.
    """
    from jinja2 import TemplateError

    settings = request.chat_template_kwargs or {}
    try:
        return tokenizer.apply_chat_template(
            [_template_message(message) for message in request.messages],
            tools=request.tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **settings,
        )
    except (TemplateError, TypeError) as error:
        raise RequestError(400, f"the chat template can't render these messages: {error}") from None


def _template_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates expect it: text as one string, the arguments of tool calls as
    objects.
    """
    message = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise RequestError(400, "messages: only parts of type text are understood")
        message["content"] = "\n".join(str(part["text"]) for part in content)
    if message.get("tool_calls"):
        message["tool_calls"] = [_template_call(call) for call in message["tool_calls"]]
    return message


def _template_call(call: Any) -> Any:
    try:
        arguments = call["function"]["arguments"]
        loaded = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (TypeError, KeyError, ValueError):
        raise RequestError(400, "messages: a tool call needs a function with arguments in JSON") from None
    return {**call, "function": {**call["function"], "arguments": loaded}}


def choice(
    request: ChatRequest,
    tokenizer: Any,
    prompt: list[int],
    tokens: list[int],
    logprobs: Sequence[float],
    stopped: bool,
    index: int,
) -> dict[str, Any]:
    """One choice of the answer. `tokens` includes the end-of-turn token, which is special and no
    part of the message's text.
    """
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    parse = bool(request.tools) and request.tool_choice != "none"
    content, calls = split_tool_calls(text) if parse else (text, [])
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "finish_reason": ("tool_calls" if calls else "stop") if stopped else "length",
        "logprobs": {
            "content": [_logprob(tokenizer, token, value) for token, value in zip(tokens, logprobs, strict=True)]
        },
        "prompt_token_ids": prompt,
        "token_ids": tokens,
        "weight_versions": [{"version": request.model, "start": 0, "end": len(tokens)}] if tokens else [],
        "sampling": request.sampling,
    }


def _logprob(tokenizer: Any, token: int, value: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}


def completion(request: ChatRequest, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole answer around its choices."""
    prompt, sampled = len(choices[0]["prompt_token_ids"]), sum(len(answer["token_ids"]) for answer in choices)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled},
    }


def split_tool_calls(text: str) -> tuple[str | None, list[dict[str, Any]]]:
    """(text before the first call, calls) of a message in the Hermes format: `<tool_call>{"name",
    "arguments"}</tool_call>`.

    Calls that are not well formed leave the whole message as text, as vLLM's parser does.
    """
    calls = []
    try:
        for closed, rest in _TOOL_CALL.findall(text):
            call = json.loads(closed or rest)
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
            calls.append({"id": f"chatcmpl-tool-{uuid.uuid4().hex}", "type": "function", "function": function})
    except (ValueError, KeyError, TypeError):
        return text, []
    return (text.partition("<tool_call>")[0] or None, calls) if calls else (text, [])
