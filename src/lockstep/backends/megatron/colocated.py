"""Ownership of the GPUs: trainer and server have GPUs of their own, or are colocated on the same
GPUs and alternate.

A colocated step: the server sleeps, the trainer's memory returns to the device, and the trainer
trains. With `offload` the trainer's memory then leaves for the host, and the server wakes. Merged
weights travel in between, while the server's weights are awake and its cache is not. Only then does
the device hold the weights of both programs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from lockstep.config import deadlines
from lockstep.errors import ServerError
from lockstep.trainer.protocol import Offload, Onload, Release

if TYPE_CHECKING:
    from lockstep.backends.megatron.run import Run


class Gpus(Protocol):
    """Moments at which the GPUs change hands."""

    async def give_to_trainer(self, *, forget_weights: bool) -> None:
        """The trainer has the device.

        forget_weights: the server's weights will be sent again before it wakes.

        Raises ServerError, and the server goes on, when requests are in flight for too long.
        """
        ...

    async def make_room_for_weights(self) -> None:
        """Both programs' weights are on the device, for a merged sync: no optimizer, no cache."""
        ...

    async def give_to_server(self) -> None:
        """The trainer's memory has left the device (with `offload`), and the server is awake."""
        ...

    def never_left_asleep(self) -> AbstractAsyncContextManager[None]:
        """An error inside that leaves the server asleep ends the server: requests would wait for
        ever.
        """
        ...


class DedicatedGpus:
    """Trainer and server have their own: nothing changes hands."""

    async def give_to_trainer(self, *, forget_weights: bool) -> None:
        """The trainer has its own."""

    async def make_room_for_weights(self) -> None:
        """There is room."""

    async def give_to_server(self) -> None:
        """The server has its own, and never sleeps."""

    @asynccontextmanager
    async def never_left_asleep(self) -> AsyncIterator[None]:
        yield


class SharedGpus:
    """Trainer and server are colocated."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def give_to_trainer(self, *, forget_weights: bool) -> None:
        run = self._run
        await run.server.sleep(2 if forget_weights else 1, deadline_s=deadlines.IN_FLIGHT_S)
        if run.settings.offload:
            async with self.never_left_asleep():
                await run.trainer.call(Onload(), deadline_s=deadlines.STEP_S)

    async def make_room_for_weights(self) -> None:
        await self._offload(keep_weights=True)
        await self._run.server.wake("weights")

    async def give_to_server(self) -> None:
        await self._offload(keep_weights=False)
        await self._run.server.wake()

    @asynccontextmanager
    async def never_left_asleep(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            if await self._asleep():
                await self._run.server.close()
            raise

    async def _asleep(self) -> bool:
        try:
            return bool((await self._run.server.version())["asleep"])
        except ServerError:
            return True

    async def _offload(self, *, keep_weights: bool) -> None:
        # Also a trainer that stays gives back what its step took beside its tensors: the server
        # counts on that memory.
        trainer = self._run.trainer
        if self._run.settings.offload:
            await trainer.call(Offload(keep_weights), deadline_s=deadlines.STEP_S)
        else:
            await trainer.call(Release(), deadline_s=deadlines.STEP_S)
