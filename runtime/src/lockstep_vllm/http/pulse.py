"""Signs of life of vLLM's engine and its workers, for whoever watches over the server.

vLLM's own `/health` knows that a process has ended, not that one hangs.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from lockstep_vllm.http.openai_fields import begun, in_flight
from lockstep_wire import http_paths

_WAIT_S = 1.0


class Pulse:
    """Asks every worker for a sign of life. `engine` is vLLM's EngineClient."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._asked: asyncio.Future[Any] | None = None
        self._busy_with: list[str] = []
        self._begun = 0
        self._longest_s: dict[str, float] = {}

    @contextmanager
    def busy(self, work: str) -> Iterator[None]:
        """Inside, the workers are expected to do `work` and to answer afterwards."""
        started = time.monotonic()
        self._busy_with.append(work)
        try:
            yield
        finally:
            self._busy_with.remove(work)
            self._longest_s[work] = max(time.monotonic() - started, self._longest_s.get(work, 0.0))

    async def look(self) -> dict[str, Any]:
        """`answered`: the engine and all workers have answered the question that is open, within a
        second. `work`: what they are busy with, or were since the last look. `longest_s`: of each
        kind of work that has ended, also between two looks.
        """
        asked = self._asked
        if asked is None or asked.done():
            asked = self._asked = asyncio.ensure_future(self._engine.collective_rpc("lockstep_alive"))
        requests = "requests" if in_flight or begun.count != self._begun else ""
        self._begun = begun.count
        work = self._busy_with[0] if self._busy_with else requests
        answered, _ = await asyncio.wait({asked}, timeout=_WAIT_S)
        if answered and asked.exception() is not None:  # an engine that has ended is no hang
            return {"answered": True, "work": "", "longest_s": {}}
        return {"answered": bool(answered), "work": work, "longest_s": self._longest_s}


def add_endpoints(app: FastAPI) -> None:
    """`/lockstep/alive`; `app.state.lockstep_pulse` is set once the engine is there."""

    @app.get(http_paths.ALIVE)
    async def alive() -> dict[str, Any]:
        return await _pulse(app.state).look()


def _pulse(state: State) -> Pulse:
    return state.lockstep_pulse
