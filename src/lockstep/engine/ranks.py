"""`python -m torch.distributed.run` for the trainer's ranks on this machine, with every socket on loopback.

`python -m lockstep.engine.ranks N ARGUMENTS...` runs Python with these arguments N times. The rendezvous stores that torch.distributed.run
brings listen on every interface; it takes one of ours instead, and gloo is told to stay on loopback.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
BACKEND = "lockstep-loopback"


def loopback_store(**settings: object) -> dist.TCPStore:
    """A TCPStore server on a free port of the loopback interface; `settings` are TCPStore's own."""
    listener = socket.create_server((LOOPBACK, 0))
    return dist.TCPStore(
        LOOPBACK,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        use_libuv=False,  # libuv's server can't take a socket over
        master_listen_fd=listener.detach(),  # else it would listen on every interface
        **settings,  # type: ignore[arg-type]
    )


class LoopbackRendezvous(RendezvousHandler):
    """One launcher that meets nobody; its ranks use its store."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store = loopback_store()

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        here = RendezvousStoreInfo(LOOPBACK, self._store.port)
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


def main(arguments: list[str]) -> None:
    """Raises SystemExit or torch's ChildFailedError, with each failed rank's status, when a rank fails; the others are ended."""
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous_handler_registry.register(BACKEND, lambda settings: LoopbackRendezvous(settings.run_id))
    run.main(["--nproc-per-node", arguments[0], "--rdzv-backend", BACKEND, *arguments[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
