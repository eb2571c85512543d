"""Colocated mode, the server's side: it gives its device memory away while the trainer works, and
takes it back.

Asleep, requests are accepted and wait in vLLM's queue until the server is awake, as during a swap.
The client's own timeout bounds the wait. vLLM has sleep and wake endpoints of its own, for
development servers only and without a deadline.

On a CPU vLLM's workers free nothing when they sleep: only the order of things is real there.
`benchmarks/colocated.py` runs them on a GPU.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import Body, FastAPI
from fastapi.responses import JSONResponse

from lockstep_vllm.http import openai_fields
from lockstep_vllm.http.pulse import Pulse
from lockstep_wire import http_paths
from lockstep_wire.transports import MOST_S

Part = Literal["weights", "kv_cache"]
PARTS: tuple[Part, ...] = ("weights", "kv_cache")


class SleepRefusedError(Exception):
    """The server goes on as before."""


class SleepControl:
    """Sleep and wake, one at a time. `engine` is vLLM's EngineClient."""

    def __init__(self, engine: Any, pulse: Pulse) -> None:
        self._engine = engine
        self._pulse = pulse
        self._lock = asyncio.Lock()
        self.asleep: set[Part] = set()

    async def sleep(self, level: int, deadline_s: float) -> dict[str, Any]:
        """Lets the requests in flight finish, then frees the device. Requests that come meanwhile
        wait until the server is awake.

        level: 1 keeps the weights in host memory, 2 forgets them (send them again after waking).

        Raises SleepRefusedError, and goes on serving, when requests are still in flight after
        `deadline_s`.
        """
        async with self._lock:
            if self.asleep:
                raise SleepRefusedError("the server is asleep already: wake it first")
            try:
                await asyncio.wait_for(self._engine.pause_generation(mode="wait", clear_cache=True), deadline_s)
            except TimeoutError:
                await self._engine.resume_generation()
                running = ", ".join(f"{count} of {name}" for name, count in sorted(openai_fields.in_flight.items()))
                raise SleepRefusedError(
                    f"requests are still in flight after {deadline_s:g} s ({running or 'not of ours'}): "
                    "wait for the rollouts to end, or stop them"
                ) from None
            with self._pulse.busy("sleep"):
                await self._engine.sleep(level, mode="keep")
            self.asleep = set(PARTS)
        return self.state()

    async def wake(self, parts: list[Part]) -> dict[str, Any]:
        """Takes memory back. Requests go on when every part is awake. Harmless for what is awake
        already.
        """
        async with self._lock:
            waking = [part for part in PARTS if part in parts and part in self.asleep]
            if waking:
                with self._pulse.busy("wake"):
                    if "kv_cache" in waking:  # it needs the room that a sync's buffers have
                        await self._engine.collective_rpc("lockstep_free_buffers")
                    await self._engine.wake_up(waking)
                self.asleep -= set(waking)
        return self.state()

    def state(self) -> dict[str, Any]:
        return {"asleep": sorted(self.asleep)}


def add_endpoints(app: FastAPI) -> None:
    """`/lockstep/sleep`, `/lockstep/wake`, `/lockstep/version`; `app.state.lockstep_sleep` is set
    once the engine is there.
    """

    def sleep_control() -> SleepControl:
        return app.state.lockstep_sleep

    @app.post(http_paths.SLEEP)
    async def sleep(
        level: Annotated[Literal[1, 2], Body()], deadline_s: Annotated[float, Body(gt=0, le=MOST_S)]
    ) -> Any:
        try:
            return await sleep_control().sleep(level, deadline_s)
        except SleepRefusedError as error:
            body = {"error": {"type": "asleep", "message": str(error), "code": 409}}
            return JSONResponse(body, status_code=409)

    @app.post(http_paths.WAKE)
    async def wake(parts: Annotated[list[Part], Body(embed=True)]) -> dict[str, Any]:
        return await sleep_control().wake(parts)

    @app.get(http_paths.VERSION)
    async def version() -> dict[str, Any]:
        """The version of the base weights, every name they answer to (the first is the current
        one), and what sleeps.
        """
        names = [path.name for path in app.state.openai_serving_models.base_model_paths]
        version = await app.state.engine_client.get_weight_version()
        return {"version": version, "names": names} | sleep_control().state()

    @app.get(http_paths.MEMORY)
    async def memory() -> dict[str, Any]:
        """Bytes of each worker: see `Receiver.lockstep_memory`."""
        return {"workers": await app.state.engine_client.collective_rpc("lockstep_memory")}
