"""What a registered model owns while it runs: its folder, its trainer, its server, and what the proof compares."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lockstep.backends.probe import Probe
from lockstep.backends.start import Parts
from lockstep.backends.trainer import Trainer
from lockstep.errors import StoreError
from lockstep.serving.client import Server
from lockstep.store import RunStore

if TYPE_CHECKING:
    from lockstep.model import TrainableModel

STEP_DEADLINE_S = 600.0
"""Longest silence of the trainer while it works; it sends heartbeats, so this bounds a hang and not a long step."""
SYNC_DEADLINE_S = 300.0
"""Longest single wait of a merged sync: to join, for the receiver of a bucket, for the swap."""


@dataclass
class Run:
    """One model between `register` and `close`."""

    store: RunStore
    trainer: Trainer
    server: Server
    probe: Probe
    parts: Parts
    served: set[int] = field(default_factory=set)
    """Steps whose adapters the server holds."""

    def check_in_step(self, model: TrainableModel) -> None:
        """Raise StoreError if a step was published that never got served: the trainer is ahead of the rollouts then."""
        latest = self.store.published()[-1]
        if latest != model.step:
            raise StoreError(
                f"{model.name} has published step {latest} but serves step {model.step}, since the step's sync failed: "
                "close the backend and register again to go on from the published step"
            )

    async def close(self) -> None:
        """End trainer and server; published steps stay."""
        await asyncio.gather(self.trainer.close(), self.server.close())
        self.store.close()
