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
from typing import TYPE_CHECKING, Any, NoReturn

from lockstep.process.guard import die_with

if TYPE_CHECKING:
    import torch.distributed as dist

LAUNCHER_VARIABLE = "LOCKSTEP_LAUNCHER"
"""Environment variable of a rank: the process that started it."""
FOLDER_VARIABLE = "LOCKSTEP_RANKS_FOLDER"
"""Environment variable of a rank: the folder in which the ranks of this launcher meet; empty for a
single rank."""


def rank_store(name: str) -> dist.Store | None:
    """The store `name` that all ranks of this launcher share, in its private folder; None without
    such a launcher.

    A single rank keeps it in memory.
    """
    import torch.distributed as dist

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


def main(arguments: list[str]) -> None:
    """Raises SystemExit or torch's ChildFailedError, with each failed rank's status, when a rank
    fails; the others are ended. A single rank takes this process's place.
    """
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if arguments[0] == "1":
        _become_the_rank(arguments[1:])
    from torch.distributed import run

    from lockstep.engine.parallel import rendezvous

    rendezvous.register()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:  # 0700
        os.environ |= {FOLDER_VARIABLE: folder, LAUNCHER_VARIABLE: str(os.getpid())}
        run.main(["--nproc-per-node", arguments[0], "--rdzv-backend", rendezvous.BACKEND, *arguments[1:]])


def _become_the_rank(command: list[str]) -> NoReturn:
    """One rank has nobody to meet and nobody to be ended with: an agent above it would cost 2 s and
    200 MB for an import of torch.
    """
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # a port that nobody listens on
        FOLDER_VARIABLE: "",  # a store in memory
    }
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torch.distributed.run has it
    os.execv(sys.executable, [sys.executable, "-u", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
