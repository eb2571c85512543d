"""Requests that are being served at the moment a test needs them to be."""

from __future__ import annotations

import asyncio
import re
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


async def sampled_tokens(server: Any) -> float:
    """How many tokens the server has sampled in its life."""
    metrics = (await server.call("GET", "/metrics")).text
    return float(re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)[0])


async def seen_sampling(server: Any, before: float, tokens: int = 40, *, seconds: float = 100.0) -> None:
    """Returns when the server has sampled so many tokens more than the `before` of then."""
    async with asyncio.timeout(seconds):
        while await sampled_tokens(server) < before + tokens:
            await asyncio.sleep(0.005)
