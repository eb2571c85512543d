"""A model that is not trained and answers some of an agent's calls: a judge, a planner, a cheaper one for titles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OtherModel:
    """Any server of Chat Completions.

    base_url: as OpenAI's clients take it, such as `https://api.openai.com/v1`. model: the name that it is asked for.
    """

    base_url: str
    model: str
    api_key: str = field(default="none", repr=False)
    slots: int | None = field(default=None, init=False, repr=False)
    max_model_len: int | None = field(default=None, init=False, repr=False)


def as_chunk(reply: Mapping[str, Any]) -> dict[str, Any]:
    """The whole reply as one chunk of a stream."""
    choices = []
    for choice in reply["choices"]:
        message = choice["message"]
        calls = [{"index": number, **call} for number, call in enumerate(message.get("tool_calls") or [])]
        delta = {name: message[name] for name in ("role", "content", "reasoning") if message.get(name)}
        delta |= {"tool_calls": calls} if calls else {}
        choices.append({"index": choice["index"], "delta": delta, "finish_reason": choice["finish_reason"]})
    prompt = [0] * int((reply.get("usage") or {}).get("prompt_tokens") or 0)
    return {"id": reply["id"], "created": reply["created"], "prompt_token_ids": prompt, "choices": choices}
