"""`python -m torch.distributed.run` for the trainer's ranks on this machine, out of other users'
reach.

`python -m lockstep.engine.parallel.launch N ARGUMENTS...` runs Python with these arguments N times.
The stores that torch.distributed.run brings listen on TCP ports, where every local user could read
and write them. The launcher's store stays in its memory. The ranks meet in files of a folder that
only this user can enter. Gloo's own sockets carry tensors; their interface is set to loopback.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from lockstep.process.guard import die_with

LOOPBACK = "127.0.0.1"
BACKEND = "lockstep-private"
LAUNCHER_VARIABLE = "LOCKSTEP_LAUNCHER"
"""Environment variable of a rank: the process that started it."""
FOLDER_VARIABLE = "LOCKSTEP_RANKS_FOLDER"
"""Environment variable of a rank: the folder in which the ranks of this launcher meet."""


def rank_store(name: str) -> dist.Store | None:
    """The store `name` that all ranks of this launcher share, in its private folder; None without
    such a launcher.

    A single rank keeps it in memory.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return None
    if os.environ.get("WORLD_SIZE") == "1":
        return dist.HashStore()
    return dist.FileStore(str(Path(folder) / name))


def die_with_launcher() -> None:
    """Ends this rank when its launcher ends, however that went: nobody would watch over the rank."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None and (ask := die_with(int(launcher))) is not None:
        ask()


def group_settings() -> dict[str, Any]:
    """Arguments of `init_process_group`: the ranks' own store, or nothing where another launcher's
    environment says it.
    """
    store = rank_store("groups")
    if store is None:
        return {}
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


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


def main(arguments: list[str]) -> None:
    """Raises SystemExit or torch's ChildFailedError, with each failed rank's status, when a rank
    fails; the others are ended.
    """
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous_handler_registry.register(BACKEND, lambda settings: PrivateRendezvous(settings.run_id))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:  # 0700
        os.environ |= {FOLDER_VARIABLE: folder, LAUNCHER_VARIABLE: str(os.getpid())}
        run.main(["--nproc-per-node", arguments[0], "--rdzv-backend", BACKEND, *arguments[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
