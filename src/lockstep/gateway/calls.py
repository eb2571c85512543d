"""Answers an episode's requests, and captures what was sampled."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep.gateway.episode import Call, Captured
from lockstep.gateway.messages import Message, identity, plain, setting_of
from lockstep.gateway.refusal import Refusal
from lockstep.gateway.tree import Place
from lockstep.gateway.upstream import Address, Upstream
from lockstep.rollouts.noise import seed_of
from lockstep_wire.history import FIELD

_FORWARDED = (
    *("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "reasoning_effort", "response_format"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "n"),
    *("logprobs", "top_logprobs", "logit_bias", "bad_words", "structured_outputs"),
)
"""Fields of a request that reach the server. OpenAI's others are for its own books."""


@dataclass
class _Attempt:
    """One request as it came, and everybody who waits for its reply."""

    task: asyncio.Task[dict[str, Any]]
    waiting: int = 0
    delivered: bool = False


@dataclass(frozen=True)
class Terms:
    """How an episode is answered.

    name: the served version. address: asked at each call, since a server may be replaced. sampling: settings of every request.
    seed: what the seeds of its requests follow from; None leaves the noise to the server.
    """

    name: str
    address: Callable[[], Address]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(eq=False)
class OpenEpisode:
    """An episode that takes calls."""

    number: int
    terms: Terms
    captured: Captured
    ended: bool = False
    _attempts: dict[str, _Attempt] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)

    async def answer(
        self, upstream: Upstream, chat: Mapping[str, Any], gone: asyncio.Event, *, again: bool
    ) -> dict[str, Any]:
        """The server's whole reply to a chat request.

        gone: set when the client has left. again: the client says that it repeats a request. A repeated request, and one whose
        first client left before the reply, gets the reply of the first: it was sampled once.
        """
        asked = json.dumps(chat, sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()
        attempt = self._attempts.get(digest)
        if attempt is None or _failed(attempt) or not (again or (attempt.waiting == 0 and not attempt.delivered)):
            attempt = self._attempts[digest] = _Attempt(asyncio.ensure_future(self._call(upstream, chat)))
        attempt.waiting += 1
        leaving = asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({attempt.task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not attempt.task.done():
                raise Refusal(499, "the client has left")
            attempt.delivered |= not gone.is_set()
            return attempt.task.result()
        finally:
            leaving.cancel()
            attempt.waiting -= 1

    async def _call(self, upstream: Upstream, chat: Mapping[str, Any]) -> dict[str, Any]:
        messages = chat.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refusal(400, "messages must be a list of at least one message")
        body = {name: chat[name] for name in _FORWARDED if chat.get(name) is not None} | dict(self.terms.sampling)
        setting = setting_of(body)
        captured = self.captured
        messages = [plain(message) for message in messages]
        if self.terms.seed is not None and body.get("seed") is None:
            body["seed"] = self._seed(self.terms.seed, setting, messages)
        with captured.lock:
            place = captured.tree.place(setting, messages)
            history = place.history()
            captured.under_way += 1
            begun = bool(captured.calls)
        body |= {"model": self.terms.name, "messages": place.conversation()}
        if history is not None:
            body[FIELD] = history.encode()
        try:
            reply = await upstream.complete(self.terms.address(), body, under_way=begun)
        finally:
            with captured.lock:
                captured.under_way -= 1
        self._keep(chat, setting, place, reply, [] if history is None else history.ids)
        return reply

    def _seed(self, seed: int, setting: str, messages: list[Message]) -> int:
        """The same for the same messages asked as often, whatever the order of calls that an agent makes at once."""
        words = f"{setting}{[identity(message) for message in messages]}"
        self._asked[words] += 1
        return seed_of(f"{seed}/{self._asked[words]}/{words}")

    def _keep(
        self, chat: Mapping[str, Any], setting: str, place: Place, reply: Mapping[str, Any], known: list[int]
    ) -> None:
        from openai.types.chat.chat_completion import Choice

        captured = self.captured
        with captured.lock:
            if self.ended:
                return
            call = len(captured.calls)
            prompt = reply["choices"][0]["prompt_token_ids"]
            if prompt[: len(known)] != known:
                first = next((k for k, token in enumerate(known) if k >= len(prompt) or prompt[k] != token), 0)
                captured.errors.append(
                    f"episode {self.number}, call {call}: the server did not continue the ids of the call before; "
                    f"token {first} is the first that differs"
                )
                raise Refusal(500, captured.errors[-1])
            replies = [(plain(choice["message"]), choice["token_ids"]) for choice in reply["choices"]]
            captured.tree.add(setting, place, prompt[len(known) :], call, replies)
            choices = [Choice.model_validate(choice) for choice in reply["choices"]]
            captured.calls.append(Call(str(chat.get("model")), chat.get("tools"), place.new, choices))


def _failed(attempt: _Attempt) -> bool:
    task = attempt.task
    return task.done() and (task.cancelled() or task.exception() is not None)
