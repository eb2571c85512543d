"""Where the launcher's agent meets other machines' agents: nobody, on this machine alone."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
BACKEND = "lockstep-private"


class PrivateRendezvous(RendezvousHandler):
    """One launcher that meets nobody."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store = dist.HashStore()

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        here = RendezvousStoreInfo(LOOPBACK, 0)  # a port that nobody listens on: ranks meet in `rank_store`
        return RendezvousInfo(dist.PrefixStore(self._run_id, self._store), 0, 1, here)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def register() -> None:
    """Makes BACKEND a rendezvous that torch.distributed.run knows."""
    rendezvous_handler_registry.register(BACKEND, lambda settings: PrivateRendezvous(settings.run_id))
