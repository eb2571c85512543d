"""Requests in flight at a chosen moment, and the server's own counters."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


async def seen_running(server: Any, ask: Callable[[], Awaitable[Any]], *, seconds: float = 100.0) -> asyncio.Task[Any]:
    """A task of `ask` while the server serves its request. A task that ends too early begins again."""
    async with asyncio.timeout(seconds):
        while True:
            task = asyncio.ensure_future(ask())
            while not task.done():
                if await server.in_flight() and not task.done():
                    return task
                await asyncio.sleep(0.01)
            await task  # an error of its own is one


async def counted(server: Any, name: str) -> float:
    """One of the server's own counters, over all of its labels."""
    [value] = await server.counters(name)
    return value


async def sampled_tokens(server: Any) -> float:
    """The number of tokens that the server has sampled in its life."""
    return await counted(server, "generation_tokens_total")


async def seen_sampling(server: Any, before: float, tokens: int = 40, *, seconds: float = 100.0) -> None:
    """Wait until the server has sampled `tokens` more than `before`."""
    async with asyncio.timeout(seconds):
        while await sampled_tokens(server) < before + tokens:
            await asyncio.sleep(0.005)
