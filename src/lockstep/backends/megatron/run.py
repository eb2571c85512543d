"""Everything that a registered model owns while it runs: its folder, trainer and server, and what
the verification compares.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.backends.megatron.colocated import DedicatedGpus, Gpus, SharedGpus
from lockstep.backends.megatron.delivery import AdapterDelivery, Delivery, MergedDelivery
from lockstep.backends.megatron.plan.settings import ResolvedSettings
from lockstep.backends.megatron.probe import Noise, Probe
from lockstep.batching.chats import ChatFormat
from lockstep.errors import ServerError, StoreError
from lockstep.inference.client import Server
from lockstep.model import TrainableModel, version_name
from lockstep.rollouts.router import Replica
from lockstep.runs.store import RunStore
from lockstep.trainer.client import Trainer

if TYPE_CHECKING:
    from lockstep.config.train import TrainConfig


_LOG = logging.getLogger(__name__)


@dataclass
class Run:
    """One model between `register` and `close`."""

    model: TrainableModel
    store: RunStore
    trainer: Trainer
    servers: list[Server]
    """The replicas that serve, at least one; each was verified."""
    settings: ResolvedSettings
    probe: Probe | None = None
    """The text that verifies a step: of the newest rollouts, and a fixed text before there are any.
    """
    noise: Noise | None = None
    """The difference between server and trainer on the base weights, measured while the model is
    registered.
    """
    served: set[int] = field(default_factory=set)
    """Steps that the server answers to: by their adapters or, merged, by name only."""
    trainer_ahead: bool = False
    """The trainer was asked for a step that is not published: nobody knows which weights it holds.
    """
    chat_format: ChatFormat | None = None
    """How chats become tokens; read from the model's folder with the first supervised step."""
    training: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by `train`: one step at a time."""
    lost: int = 0
    """Replicas that were lost, beside one that still served, since rollouts last failed."""
    mending: asyncio.Task[None] | None = None
    """Replaces lost replicas, where there are several."""
    gpus: Gpus = field(init=False)
    delivery: Delivery = field(init=False)

    def __post_init__(self) -> None:
        self.gpus = SharedGpus(self) if self.settings.colocated else DedicatedGpus()
        self.delivery = MergedDelivery(self) if self.settings.merged else AdapterDelivery(self)

    @property
    def server(self) -> Server:
        """The first of the servers."""
        return self.servers[0]

    def addresses(self) -> tuple[Replica, ...]:
        return tuple(Replica(server.replica, server.base_url, server.api_key) for server in self.servers)

    async def problem(self) -> str:
        """Why no server can serve any more, in one line; empty while one lives."""
        problems = [await server.problem() for server in self.servers]
        return problems[0] if all(problems) else ""

    async def on_servers(self, act: Callable[[Server], Awaitable[None]]) -> None:
        """Call `act` with each server. One that is lost meanwhile is left out from then on, if
        another lives.
        """
        for server in tuple(self.servers):
            try:
                await act(server)
            except ServerError:
                if not await self.left_out(server):
                    raise

    async def left_out(self, server: Server) -> bool:
        """Whether a server was lost, and another lives: then the run goes on without the lost one."""
        problem = "" if len(self.servers) == 1 else await server.problem()
        return bool(problem) and await self.end_server(server, problem)

    async def end_server(self, server: Server, why: str) -> bool:
        """Go on without one of several servers, which will be replaced. Returns False for the last one."""
        if len(self.servers) == 1 or server not in self.servers:
            return False
        self.servers.remove(server)
        self.lost += 1
        _LOG.warning(
            "%s; %d of %d servers go on", str(why).splitlines()[0].removesuffix(":"), len(self.servers), self.replicas
        )
        await server.close()
        return True

    @property
    def replicas(self) -> int:
        """The number of servers that the run wants."""
        return len(self.settings.devices.servers)

    def name(self, step: int) -> str:
        """The name under which the step is served."""
        return version_name(self.model.name, step)

    def kept(self, current: int) -> set[int]:
        """Steps that rollouts may still ask for when `current` is served: it, the one before it,
        and what running rollouts hold.
        """
        return {current, current - 1} | self.model.leased_steps()

    def needed(self, current: int) -> set[int]:
        """Steps whose folders stay while `current` is served: a server that starts again loads
        them. Step 0 of adapters is small, and a KL penalty that is set later pulls towards it.
        """
        return self.kept(current) | self.served | ({0} if self.settings.lora is not None else set())

    def reference(self, config: TrainConfig) -> Path | None:
        """The folder of the step that the KL penalty pulls towards; None without a penalty. Raises
        StoreError for a step that is not there, or is of another base model.
        """
        full, number = self.settings.lora is None, config.reference_step
        if config.kl_reference_path is not None:
            return self.store.teacher(config.kl_reference_path, full)
        return None if number is None else self.store.reference(number, full)

    @property
    def numerics(self) -> str:
        """The precision of both sides: the weights' dtype, or "exact"."""
        return "exact" if self.settings.exact else self.settings.dtype

    def check_in_step(self) -> None:
        """Raise StoreError if a step was published that never got served: the trainer is ahead of
        the rollouts then.
        """
        model, latest = self.model, self.store.published()[-1]
        if latest != model.step:
            raise StoreError(
                f"{model.name} has published step {latest} but serves step {model.step}, since the step's sync failed: "
                "close the backend and register again to go on from the published step"
            )

    async def close(self) -> None:
        """End trainer and server and the model's connections; published steps stay."""
        try:
            await self.ended()
        finally:
            self.store.close()

    async def ended(self) -> None:
        """End trainer and server and the model's connections."""
        mending, self.mending = self.mending, None
        if mending is not None:
            mending.cancel()
            await asyncio.wait([mending])
        await all_ended(self.model._released(), self.trainer.close(), *(server.close() for server in self.servers))


async def all_ended(*closing: Awaitable[None]) -> None:
    """Wait for all of them, whatever becomes of the others; then raise the first error."""
    for ended in await asyncio.gather(*closing, return_exceptions=True):
        if isinstance(ended, BaseException):
            raise ended
