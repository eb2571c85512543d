"""The processes of a server: what they hold, and how they stop answering when a test needs it, and go on when it lets them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def children(pid: int) -> list[int]:
    """Ids of the processes that `pid` started."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def below(pid: int) -> list[int]:
    """Ids of all processes under `pid`."""
    return [*children(pid), *(deeper for child in children(pid) for deeper in below(child))]


def engine_core(server: Any) -> int:
    """The process of a running server that schedules: a child of the API process, and the parent of the workers."""
    return next(child for api in children(server.child.pid) for child in children(api) if children(child))


def shared_memory(pid: int) -> set[Path]:
    """What the processes under `pid` share by Python's `SharedMemory`."""
    lines = (line for child in below(pid) for line in Path(f"/proc/{child}/maps").read_text().splitlines())
    return {Path(line.split()[-1]) for line in lines if "/dev/shm/psm_" in line}


@contextmanager
def stopped_at(monkeypatch: Any, run: Any, verb: str) -> Iterator[None]:
    """Inside, every process of the run's server stops (SIGSTOP) when the trainer is asked for `verb`; at the end they go on."""
    processes, call = below(run.server.child.pid), run.trainer.call

    async def stopping(request: Any, **kwargs: Any) -> Any:
        if request.verb == verb:
            for pid in processes:
                os.kill(pid, signal.SIGSTOP)
        return await call(request, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run.trainer, "call", stopping)
        try:
            yield
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1 and ::1 as /proc/net writes them."""


def listening(pid: int) -> list[str]:
    """The addresses, as /proc/net writes them, on which a process has TCP sockets that listen."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(file))
        except FileNotFoundError:  # the descriptor that lists the others
            continue
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
