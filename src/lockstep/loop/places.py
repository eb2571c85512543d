"""Places for rollouts: as many at once as there are, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import deque


class Places:
    """`async with places:` holds one. Their number may change at any time; rollouts under way go on."""

    def __init__(self, count: int):
        self.count = count
        self.used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> int:
        """Places that nobody holds or waits for; negative while some wait."""
        return self.count - self.used - sum(not place.done() for place in self._waiting)

    def resize(self, count: int) -> None:
        self.count = count
        self._grant()

    async def __aenter__(self) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._grant()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._give_back()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._give_back()

    def _give_back(self) -> None:
        self.used -= 1
        self._grant()

    def _grant(self) -> None:
        while self._waiting and (self._waiting[0].done() or self.used < self.count):
            place = self._waiting.popleft()
            if not place.done():
                self.used += 1
                place.set_result(None)
