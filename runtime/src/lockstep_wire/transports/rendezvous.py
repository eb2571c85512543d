"""The meeting point of a sender and its receivers: files in a folder that only their user can enter.

torch's TCPStore would listen on a port where every local user could read and write it.
"""

from __future__ import annotations

import os
import queue
import shutil
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from lockstep_wire.transports.base import TransportError, UnusableTransportError

Made = TypeVar("Made")


def listen(world: int, deadline: timedelta) -> tuple[dist.FileStore, dict[str, Any]]:
    """A store for `world` processes of this user on this machine, and what `join` needs. The files
    go with the store.
    """
    folder = tempfile.mkdtemp(prefix="lockstep-sync-")  # 0700
    store = _store(Path(folder), world, deadline.total_seconds())
    weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    return store, {"folder": folder, "world_size": world, "deadline_s": deadline.total_seconds()}


def join(info: dict[str, Any]) -> dist.FileStore:
    """The store of `listen`. Raises UnusableTransportError for a folder that others can enter, or
    that is none.
    """
    folder = Path(info["folder"])
    try:
        state = os.lstat(folder)
    except (OSError, ValueError) as error:
        raise UnusableTransportError(f"the sender's folder {folder} can't be seen here: {error}") from None
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or stat.S_IMODE(state.st_mode) & 0o077:
        raise UnusableTransportError(f"{folder} is no private folder of this user: no sender made it")
    return _store(folder, int(info["world_size"]), float(info["deadline_s"]))


def wait_for(store: dist.Store, keys: list[str], deadline_s: float) -> list[str]:
    """Waits until `store` has all `keys`; those that are missing at the deadline.

    A FileStore's own `wait` looks every 10 ms only, which a sync of many buckets would feel.
    """
    end, pause_s = time.monotonic() + deadline_s, 0.0002
    while not store.check(keys):
        if time.monotonic() > end:
            return [key for key in keys if not store.check([key])]
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.02)
    return []


def within(deadline_s: float, who: str, step: Callable[[], Made]) -> Made:
    """What `step` returns or raises. Raises TransportError, which names `who`, at the deadline.

    torch keeps its own timeouts for some of the waits of a connection only: a peer that is stopped
    would be waited for without end. The thread that waits is left behind.
    """
    done: queue.SimpleQueue[tuple[Made | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((step(), None))
        except BaseException as error:  # noqa: BLE001 (raised again where it is waited for)
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        made, error = done.get(timeout=deadline_s)
    except queue.Empty:
        raise TransportError(f"{who} did not connect within {deadline_s:g} s") from None
    if error is not None:
        raise error
    return cast(Made, made)


def _store(folder: Path, world: int, deadline_s: float) -> dist.FileStore:
    store = dist.FileStore(str(folder / "store"), world)
    store.set_timeout(timedelta(seconds=deadline_s))
    return store
