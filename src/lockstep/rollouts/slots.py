"""As many requests at a server as it serves at once: the others wait here, where no deadline runs.

vLLM takes every request and lets it queue, while the client's deadline goes on. A request that is
given up there begins again, and its computation is lost. So a request leaves this process when
there is a place for it, and its deadline counts from then.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
from typing import Any

from lockstep.rollouts.connections import is_broken, redirect
from lockstep.rollouts.leases import current_scope
from lockstep.rollouts.router import Replica, Router
from lockstep_wire import http_paths

_SAMPLING = ("/completions", "/responses", "/messages", http_paths.SIBLINGS)
"""Ends of the paths of requests that take a place."""


class Slots:
    """The places of one server, for one event loop. Requests of rollouts under way go first, then
    in order.
    """

    def __init__(self, count: int):
        self.count = self._free = count
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    async def take(self, places: int, *, under_way: bool) -> int:
        """Wait until `places` are free and take them; returns how many: never more than there are."""
        places = min(places, self.count)
        granted = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (not under_way, next(self._order), places, granted))
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give_back(places)
            else:
                self._grant()  # whoever stood behind it
            raise
        return places

    def give_back(self, places: int) -> None:
        self._free += places
        self._grant()

    def _grant(self) -> None:
        while self._waiting and (self._waiting[0][3].done() or self._waiting[0][2] <= self._free):
            _, _, places, granted = heapq.heappop(self._waiting)
            if not granted.done():
                self._free -= places
                granted.set_result(None)


def choices_of(body: dict[str, Any]) -> int:
    """How many choices a request asks for: each takes a place. A sibling is one, too."""
    choices = len(body["seeds"]) if "seeds" in body else body.get("n")
    return choices if isinstance(choices, int) and choices > 0 else 1


def token_limit(body: dict[str, Any], longest: int) -> int:
    """Tokens that a request may sample at most; `longest` where it does not say."""
    body = body.get("request", body)
    asked = [body.get(name) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")]
    return next((value for value in asked if isinstance(value, int) and value > 0), longest)


class SlotSending:
    """A mixin for openai's HTTP client, which holds back `send`: requests that sample leave when
    there is a slot for them.

    The end of the reply gives the place back. Before the end of a stream, `give_place_back` of its
    `extensions` gives one of several back.
    """

    slots: Slots | None = None
    router: Router | None = None
    """Where there are several servers, each with as many places as `slots`."""
    default_s: float = 0.0
    """The client's own read deadline, in seconds. A request that came with no other gets a second
    more for each token it may sample.
    """
    longest: int = 0
    """Tokens of a request that does not say how many."""

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        send = super().send  # pyright: ignore[reportAttributeAccessIssue]
        if request.method != "POST" or not request.url.path.endswith(_SAMPLING):
            if self.router is not None:
                redirect(request, self.router.anyone())
            return await send(request, stream=stream, **options)
        body = _parsed(await request.aread())
        limits = request.extensions.get("timeout", {})
        if limits.get("read") == self.default_s:
            request.extensions["timeout"] = {**limits, "read": self.default_s + token_limit(body, self.longest)}
        if self.router is not None:
            return await self._routed(send, request, body, stream, options)
        return await _sent(self._slots_of(None), send, request, body, stream, options)

    async def _routed(self, send: Any, request: Any, body: dict[str, Any], stream: bool, options: Any) -> Any:
        """The answer of the replica to which the rollout, or this request, belongs."""
        assert self.router is not None
        hold, alone = self.router.hold(body), current_scope() is None
        replica = hold.replica()
        try:
            redirect(request, replica)
            response = await _sent(self._slots_of(replica), send, request, body, stream, options)
            if response.status_code >= 500:  # its engine may have ended
                self.router.broke_off(replica.base_url)
            return response
        except Exception as error:
            if is_broken(error):
                self.router.broke_off(replica.base_url)
            raise
        finally:
            if alone:
                hold.end()

    def _slots_of(self, replica: Replica | None) -> Slots | None:
        """The places of one of several servers; of the only one for None."""
        if replica is None or self.slots is None:
            return self.slots
        known: dict[Replica, Slots] = self.__dict__.setdefault("_slots_of_replicas", {})
        return known.setdefault(replica, Slots(self.slots.count))


async def _sent(slots: Slots | None, send: Any, request: Any, body: dict[str, Any], stream: bool, options: Any) -> Any:
    if slots is None:
        response = await send(request, stream=stream, **options)
        response.extensions["give_place_back"] = lambda: None
        return response
    places = await _place(slots, body)
    give_back = _Once(slots, places)
    try:
        response = await send(request, stream=stream, **options)
    except BaseException:
        give_back()
        raise
    response.extensions["give_place_back"] = lambda: give_back(1)
    if not stream:
        give_back()
        return response
    close = response.aclose

    async def closed() -> None:
        try:
            await close()
        finally:
            give_back()

    response.aclose = closed
    return response


async def _place(slots: Slots, body: dict[str, Any]) -> int:
    scope = current_scope()
    places = await slots.take(choices_of(body), under_way=scope is not None and scope.served)
    if scope is not None:
        scope.served = True
    return places


class _Once:
    """Gives places back, each once."""

    def __init__(self, slots: Slots, places: int):
        self._slots, self._places = slots, places

    def __call__(self, count: int | None = None) -> None:
        """Gives `count` back, or all that are left."""
        places = self._places if count is None else min(count, self._places)
        self._places -= places
        if places:
            self._slots.give_back(places)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except ValueError:
        return {}
    return request if isinstance(request, dict) else {}
