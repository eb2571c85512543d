"""Answers an episode's requests, and captures what was sampled."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lockstep.gateway.episode import Call, Captured
from lockstep.gateway.messages import Message, identity, plain, setting_of
from lockstep.gateway.other_model import OtherModel, as_chunk
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


_SERVERS = 4
"""Of several, asked one after another while each is lost."""
_LOOK_S = 60.0
"""Between two looks of a client that learns of everything anyway."""


class Attempt:
    """One request as it came, the chunks of its reply so far, and everybody who waits for it."""

    def __init__(self, call: Callable[[Attempt], Coroutine[Any, Any, dict[str, Any]]]) -> None:
        self.waiting = 0
        self.delivered = False
        self._chunks: list[dict[str, Any]] = []
        self._news: list[asyncio.Future[None]] = []
        self.task = asyncio.ensure_future(call(self))
        self.task.add_done_callback(self.tell)

    def take(self, chunk: dict[str, Any]) -> None:
        """The next chunk of the reply."""
        self._chunks.append(chunk)
        self.tell()

    async def chunks(self, number: int, limit_s: float) -> list[dict[str, Any]]:
        """The chunks from `number` on, once there is one, the reply has ended, `limit_s` have passed, or `tell` is called."""
        if number == len(self._chunks) and not self.task.done():
            loop = asyncio.get_running_loop()
            news = loop.create_future()
            self._news.append(news)
            late = loop.call_later(limit_s, self.tell)
            try:
                await news
            finally:
                late.cancel()
        return self._chunks[number:]

    def tell(self, _: object = None) -> None:
        """Wakes everybody who waits, to look for himself."""
        waiting, self._news = self._news, []
        for news in waiting:
            if not news.done():
                news.set_result(None)

    @property
    def failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


@dataclass(frozen=True)
class Terms:
    """How an episode is answered.

    name: the served version. address: asked at each call, since a server may be replaced. sampling: settings of every request.
    seed: what the seeds of its requests follow from; None leaves the noise to the server.
    broke_off: called with the base URL of a server that gave no answer; says whether another may give one.
    models: by names that an agent asks for, which may have `*` in them: who answers in place of the episode's model.
    """

    name: str
    address: Callable[[], Address]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    broke_off: Callable[[str], bool] | None = None
    models: Mapping[str, OtherModel] = field(default_factory=dict)


@dataclass(eq=False)
class OpenEpisode:
    """An episode that takes calls."""

    number: int
    terms: Terms
    captured: Captured
    ended: bool = False
    _attempts: dict[str, Attempt] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)

    def attempt(self, upstream: Upstream, chat: Mapping[str, Any], *, again: bool, stream: bool) -> Attempt:
        """The request's attempt, which goes on whoever leaves.

        again: the client says that it repeats a request. A repeated request, and one whose first client left before the reply,
        gets the reply of the first: it was sampled once.
        """
        asked = json.dumps([stream, chat], sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()
        attempt = self._attempts.get(digest)
        if attempt is None or attempt.failed or not (again or (attempt.waiting == 0 and not attempt.delivered)):
            asked_name = str(chat.get("model"))
            other = next((model for name, model in self.terms.models.items() if fnmatchcase(asked_name, name)), None)

            def call(attempt: Attempt) -> Coroutine[Any, Any, dict[str, Any]]:
                taken = attempt.take if stream else None
                if other is None:
                    return self._call(upstream, chat, taken)
                return self._elsewhere(upstream, chat, other, taken)

            attempt = self._attempts[digest] = Attempt(call)
        return attempt

    async def answer(self, attempt: Attempt, gone: asyncio.Event) -> dict[str, Any]:
        """The server's whole reply. gone: set when the client has left."""
        with self.waits_for(attempt, gone):
            while not attempt.task.done():
                if gone.is_set():
                    raise Refusal(499, "the client has left")
                await attempt.chunks(0, _LOOK_S)
            return attempt.task.result()

    @contextmanager
    def waits_for(self, attempt: Attempt, gone: asyncio.Event) -> Iterator[None]:
        """Around a client's wait. A reply is delivered where the client is still there at its end."""
        attempt.waiting += 1
        try:
            yield
        finally:
            attempt.waiting -= 1
            attempt.delivered |= attempt.task.done() and not gone.is_set()

    async def _call(
        self, upstream: Upstream, chat: Mapping[str, Any], taken: Callable[[dict[str, Any]], None] | None
    ) -> dict[str, Any]:
        messages = chat.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refusal(400, "messages must be a list of at least one message")
        body = _forwarded(chat) | dict(self.terms.sampling)
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
            reply = await self._answered(upstream, body, taken, begun)
        finally:
            with captured.lock:
                captured.under_way -= 1
        self._keep(chat, setting, place, reply, [] if history is None else history.ids)
        return reply

    async def _answered(
        self, upstream: Upstream, body: dict[str, Any], taken: Callable[[dict[str, Any]], None] | None, begun: bool
    ) -> dict[str, Any]:
        """The server's reply; another server's where the first is lost before anything of it came."""
        came = False

        def noted(chunk: dict[str, Any]) -> None:
            nonlocal came
            came = True
            assert taken is not None
            taken(chunk)

        for _ in range(_SERVERS):
            address = self.terms.address()
            try:
                if taken is None:
                    return await upstream.complete(address, body, under_way=begun)
                return await upstream.stream(address, body, noted, under_way=begun)
            except Refusal as refusal:
                broke_off = self.terms.broke_off
                if refusal.status < 500 or came or broke_off is None or not broke_off(address.base_url):
                    raise
        raise Refusal(502, f"{_SERVERS} of the run's servers gave no reply")

    async def _elsewhere(
        self,
        upstream: Upstream,
        chat: Mapping[str, Any],
        other: OtherModel,
        taken: Callable[[dict[str, Any]], None] | None,
    ) -> dict[str, Any]:
        """Another model's reply, which is counted and not captured. A stream gets it whole."""
        body = _forwarded(chat) | {"model": other.model, "messages": chat.get("messages")}
        reply = await upstream.elsewhere(other, body)
        with self.captured.lock:
            self.captured.elsewhere[str(chat.get("model"))] += 1
        if taken is not None:
            taken(as_chunk(reply))
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
            continues = None if place.parent is None else place.parent.call
            captured.calls.append(Call(call, continues, str(chat.get("model")), chat.get("tools"), place.new, choices))


def _forwarded(chat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: chat[name] for name in _FORWARDED if chat.get(name) is not None}
