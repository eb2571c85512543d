"""Everything that a registered model owns while it runs: its folder, trainer and server, and what
the verification compares.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.backends.megatron.colocated import DedicatedGpus, Gpus, SharedGpus
from lockstep.backends.megatron.delivery import AdapterDelivery, Delivery, MergedDelivery
from lockstep.backends.megatron.plan.settings import ResolvedSettings
from lockstep.backends.megatron.probe import Noise, Probe
from lockstep.batching.chats import ChatFormat
from lockstep.errors import StoreError
from lockstep.inference.client import Server
from lockstep.model import TrainableModel, version_name
from lockstep.runs.store import RunStore
from lockstep.trainer.client import Trainer

if TYPE_CHECKING:
    from lockstep.config.train import TrainConfig


@dataclass
class Run:
    """One model between `register` and `close`."""

    model: TrainableModel
    store: RunStore
    trainer: Trainer
    server: Server
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
    gpus: Gpus = field(init=False)
    delivery: Delivery = field(init=False)

    def __post_init__(self) -> None:
        self.gpus = SharedGpus(self) if self.settings.colocated else DedicatedGpus()
        self.delivery = MergedDelivery(self) if self.settings.merged else AdapterDelivery(self)

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
        await all_ended(self.model._released(), self.trainer.close(), self.server.close())


async def all_ended(*closing: Awaitable[None]) -> None:
    """Wait for all of them, whatever becomes of the others; then raise the first error."""
    for ended in await asyncio.gather(*closing, return_exceptions=True):
        if isinstance(ended, BaseException):
            raise ended
