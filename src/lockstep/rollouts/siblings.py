"""Requests of one group that differ in their seed alone leave as one (`lockstep_wire/siblings.py`).

The rollouts of a group begin with the same prompt, at the same moment. As one request they cost
the client and the server about half. Each rollout gets its reply when its own tokens are there,
and the reply is the one that its request alone would get.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from lockstep.rollouts.leases import RolloutScope, current_scope
from lockstep.rollouts.noise import current_place
from lockstep_wire import siblings

logger = logging.getLogger(__name__)

_ALONE = ("stream", "use_beam_search")


class _Family:
    """Siblings that leave together.

    body: of the chat completion, without a seed.
    timeout: the client's, or the request's own.
    """

    def __init__(self, body: dict[str, Any], timeout: Any):
        self.body, self.timeout = body, timeout
        self.seeds: list[int | None] = []
        self._replies: list[asyncio.Future[dict[str, Any] | None]] = []
        self._scopes: list[RolloutScope | None] = []
        self.sending: asyncio.Task[None] | None = None

    def join(self, seed: int | None) -> asyncio.Future[dict[str, Any] | None]:
        """The reply to come; None says that the request must be sent alone."""
        reply: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        reply.add_done_callback(lambda _: self._end_if_unwanted())
        self.seeds.append(seed)
        self._replies.append(reply)
        self._scopes.append(current_scope())
        return reply

    def give(self, position: int, reply: dict[str, Any] | None) -> None:
        scope = self._scopes[position]
        if scope is not None:
            scope.served = True
        if not self._replies[position].done():
            self._replies[position].set_result(reply)

    def give_up(self) -> None:
        """Whoever has no reply asks alone."""
        for reply in self._replies:
            if not reply.done():
                reply.set_result(None)

    def _end_if_unwanted(self) -> None:
        """Ends the sending when nobody waits for what is still to come."""
        unwanted = all(reply.done() for reply in self._replies)
        if self.sending is not None and unwanted and any(reply.cancelled() for reply in self._replies):
            self.sending.cancel()


class SiblingRequests:
    """Mixed into an OpenAI client, whose `request` it calls for requests that have no siblings."""

    siblings_url: str | None = None
    """Where the server takes siblings; None: it does not."""
    most_siblings: int = siblings.MOST

    async def request(self, cast_to: Any, options: Any, **how: Any) -> Any:
        alone = super().request  # pyright: ignore[reportAttributeAccessIssue]
        body = self._body_of_sibling(cast_to, options, how)
        if body is None:
            return await alone(cast_to, options, **how)
        if (router := getattr(self._client, "router", None)) is not None:  # pyright: ignore[reportAttributeAccessIssue]
            router.hold(body)  # the rollout stays where its siblings are answered
        seed = body.pop("seed", None)
        reply = await self._family_of(body, options.timeout).join(seed)
        if reply is None:
            return await alone(cast_to, options, **how)
        return cast_to.construct(**reply)

    def _body_of_sibling(self, cast_to: Any, options: Any, how: dict[str, Any]) -> dict[str, Any] | None:
        """The body of a request that may have siblings; None for every other."""
        from openai import NotGiven
        from openai.types.chat import ChatCompletion

        if self.siblings_url is None or current_place() is None or cast_to is not ChatCompletion or how.get("stream"):
            return None
        plain = isinstance(options.headers, NotGiven) or not options.headers
        plain = plain and isinstance(options.post_parser, NotGiven) and not options.params and not options.files
        if options.url != "/chat/completions" or not plain or not isinstance(options.json_data, dict):
            return None
        body = {**options.json_data, **(options.extra_json or {})}
        if body.get("n") not in (None, 1) or any(body.get(name) for name in _ALONE):
            return None
        return body

    def _family_of(self, body: dict[str, Any], timeout: Any) -> _Family:
        """The family that now gathers for this body. It leaves when the event loop has run every
        rollout that is ready now.
        """
        gathering: dict[str, _Family] = self.__dict__.setdefault("_gathering", {})
        key = f"{json.dumps(body, sort_keys=True)} {timeout!r}"
        if key not in gathering:
            gathering[key] = _Family(body, timeout)
            asyncio.get_running_loop().call_soon(self._leave, key)
        return gathering[key]

    def _leave(self, key: str) -> None:
        family: _Family = self.__dict__["_gathering"].pop(key)
        if len(family.seeds) == 1:
            family.give_up()
        else:
            family.sending = asyncio.ensure_future(self._send(family))

    async def _send(self, family: _Family) -> None:
        starts = range(0, len(family.seeds), self.most_siblings)
        sent = await asyncio.gather(*(self._send_some(family, start) for start in starts), return_exceptions=True)
        for error in sent:
            if isinstance(error, Exception):
                logger.debug("siblings ask alone", exc_info=error)
        family.give_up()

    async def _send_some(self, family: _Family, start: int) -> None:
        from openai import NotGiven

        client: Any = self._client  # pyright: ignore[reportAttributeAccessIssue]
        timeout = self.timeout if isinstance(family.timeout, NotGiven) else family.timeout  # pyright: ignore[reportAttributeAccessIssue]
        seeds = family.seeds[start : start + self.most_siblings]
        request = client.build_request(
            "POST",
            self.siblings_url,
            json=siblings.posted(family.body, seeds),
            headers=self.auth_headers,  # pyright: ignore[reportAttributeAccessIssue]
            timeout=timeout,
        )
        response = await client.send(request, stream=True)
        try:
            if response.status_code != 200:
                return
            async for text in response.aiter_lines():
                position, reply = siblings.read(text)
                family.give(start + position, reply)
                response.extensions["give_place_back"]()
        finally:
            await response.aclose()
