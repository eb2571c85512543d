"""The delivery of a step to the server: as an adapter beside the served ones, or merged into the
served weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lockstep.config import deadlines
from lockstep.trainer.protocol import Save, SyncAdapter, SyncReport, SyncWeights

if TYPE_CHECKING:
    from pathlib import Path

    from lockstep.backends.megatron.run import Run
    from lockstep.inference.client import Server
    from lockstep.trainer.protocol import Request


class Delivery(Protocol):
    """The differences between the two deliveries.

    replaces: new weights take the place of what is served. The step is published before the sync. A
        colocated server may forget its weights while the trainer works, and a failed sync leaves
        the server without weights.
    """

    replaces: bool

    def written_by_step(self, staged: Path) -> Path | None:
        """The folder to which `TrainStep` writes the step; None: `write` does so later."""
        ...

    async def write(self, staged: Path) -> None:
        """Write the step's folder, unless `TrainStep` did."""
        ...

    async def before_sync(self, server: Server, number: int) -> None:
        """Keep what running rollouts ask for, before step `number` arrives."""
        ...

    def request(self, **fields: Any) -> Request[SyncReport]:
        """The trainer's request for a sync."""
        ...

    def arrived(self, server: Server, name: str) -> None:
        """The server answers to `name` from now on."""
        ...

    async def retire(self, number: int) -> None:
        """No rollout uses step `number` any more."""
        ...

    async def withdraw(self, number: int) -> None:
        """Step `number` was never published: the server shall not serve it. No rollout ever got its
        name.
        """
        ...

    def served(self) -> str:
        """Name of the newest step that the server holds; at the start it holds the base model only."""
        ...

    def older(self, number: int) -> set[int]:
        """Steps beside `number` that a new server has to load from their folders."""
        ...


class AdapterDelivery:
    """The adapter leaves the trainer's memory first; its folder is written while the server is
    verified.
    """

    replaces = False

    def __init__(self, run: Run) -> None:
        self._run = run

    def written_by_step(self, staged: Path) -> Path | None:
        return None

    async def write(self, staged: Path) -> None:
        await self._run.trainer.call(Save(staged), deadline_s=deadlines.STEP_S)

    async def before_sync(self, server: Server, number: int) -> None:
        """Older adapters stay served until they are retired."""

    def request(self, **fields: Any) -> SyncAdapter:
        return SyncAdapter(**fields)

    def arrived(self, server: Server, name: str) -> None:
        """The base model keeps its name."""

    async def retire(self, number: int) -> None:
        await self._run.on_servers(lambda server: server.unload_adapter(self._run.name(number)))

    async def withdraw(self, number: int) -> None:
        name = self._run.name(number)

        async def unload(server: Server) -> None:
            if name in await server.models():
                await server.unload_adapter(name)

        await self._run.on_servers(unload)

    def served(self) -> str:
        run = self._run
        return run.name(max(run.served)) if run.served else run.server.served_name

    def older(self, number: int) -> set[int]:
        return self._run.kept(number) & self._run.served - {number}


class MergedDelivery:
    """The merged weights become the server's base weights, under the step's name."""

    replaces = True

    def __init__(self, run: Run) -> None:
        self._run = run

    def written_by_step(self, staged: Path) -> Path | None:
        return staged

    async def write(self, staged: Path) -> None:
        """`TrainStep` did."""

    async def before_sync(self, server: Server, number: int) -> None:
        """Running rollouts go on under the name they began with; each token says which weights made
        it.
        """
        run = self._run
        await server.keep_names([run.name(old) for old in sorted(run.kept(number) & run.served - {number})])

    def request(self, **fields: Any) -> SyncWeights:
        return SyncWeights(**fields)

    def arrived(self, server: Server, name: str) -> None:
        server.served_name = name

    async def retire(self, number: int) -> None:
        """Only the name is left of an older step, and `before_sync` drops it."""

    async def withdraw(self, number: int) -> None:
        """An unpublished step is not served: the published one is sent again, over it."""

    def served(self) -> str:
        return self._run.server.served_name

    def older(self, number: int) -> set[int]:
        return set()
