"""Requests that are being served at the moment a test needs them to be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


async def seen_running(server: Any, ask: Callable[[], Awaitable[Any]], *, seconds: float = 100.0) -> asyncio.Task[Any]:
    """A task of `ask` that the server said it was serving. One that ends before the server could be asked is begun again."""
    async with asyncio.timeout(seconds):
        while True:
            task = asyncio.ensure_future(ask())
            while not task.done():
                if await server.in_flight() and not task.done():
                    return task
                await asyncio.sleep(0.01)
            await task  # an error of its own is one
