"""Colocated mode: trainer and server on the same GPUs take turns. Everything here does nothing when each has its own.

A step: the server sleeps, the trainer's memory comes back to the device, it trains; then it goes to the host again (with `offload`), and
the server wakes. Merged weights travel in between, when the server's weights are awake and its cache is not: the only moment at which
the device holds both programs' weights.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lockstep.backends.megatron.run import Run
from lockstep.config import deadlines
from lockstep.errors import ServerError
from lockstep.trainer.protocol import Offload, Onload, Release


async def give_gpu_to_trainer(run: Run, *, forget_weights: bool) -> None:
    """The server sleeps, the trainer has the device.

    forget_weights: the server's weights will be sent again before it wakes. Raises ServerError, and the server goes on, when requests
    are in flight for too long.
    """
    if not run.settings.colocated:
        return
    await run.server.sleep(2 if forget_weights else 1, deadline_s=deadlines.IN_FLIGHT_S)
    if run.settings.offload:
        async with never_left_asleep(run):
            await run.trainer.call(Onload(), deadline_s=deadlines.STEP_S)


@asynccontextmanager
async def never_left_asleep(run: Run) -> AsyncIterator[None]:
    """An error inside that leaves the server asleep ends the server: requests would wait for ever."""
    try:
        yield
    except BaseException:
        if run.settings.colocated and await _asleep(run):
            await run.server.close()
        raise


async def _asleep(run: Run) -> bool:
    try:
        return bool((await run.server.version())["asleep"])
    except ServerError:
        return True


async def make_room_for_weights(run: Run) -> None:
    """Both programs' weights on the device, for a merged sync: no optimizer, no cache."""
    if not run.settings.colocated:
        return
    await _offload(run, keep_weights=True)
    await run.server.wake("weights")


async def give_gpu_to_server(run: Run) -> None:
    """The trainer's memory leaves the device (with `offload`), and the server is awake."""
    if not run.settings.colocated:
        return
    await _offload(run, keep_weights=False)
    await run.server.wake()


async def _offload(run: Run, *, keep_weights: bool) -> None:
    # Also a trainer that stays gives back what its step took beside its tensors: the server counts on that memory.
    if run.settings.offload:
        await run.trainer.call(Offload(keep_weights), deadline_s=deadlines.STEP_S)
    else:
        await run.trainer.call(Release(), deadline_s=deadlines.STEP_S)
