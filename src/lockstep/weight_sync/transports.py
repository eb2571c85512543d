"""How buckets get from a sender to the server's workers: one connection per sending rank, every worker receives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lockstep.errors import ConfigError, ServerError
from lockstep.weight_sync.rendezvous import listen
from lockstep.weight_sync.transport_disk import DiskTransport
from lockstep.weight_sync.transport_ipc import IpcTransport
from lockstep.weight_sync.transport_nccl import NcclTransport


class Transport(Protocol):
    """One way to send, for one sender. `open` and `accept` belong together: the server is told `open`'s answer in between."""

    def open(self, receivers: int) -> dict[str, Any]:
        """Prepares for that many receivers; returns what each needs to connect, as JSON."""
        ...

    def accept(self) -> None:
        """Waits until every receiver has connected. Raises ServerError at the deadline."""
        ...

    def send(self, bytes_N: torch.Tensor) -> None:
        """Sends a bucket. What is queued on the current stream after the `send` of the bucket after it may overwrite it."""
        ...

    def flush(self) -> None:
        """Waits until every bucket has left. Raises ServerError at the deadline."""
        ...

    def close(self) -> None:
        """Drops the connection; harmless twice."""
        ...


class GlooTransport:
    """Broadcasts over gloo on the loopback interface: for CPU and for tests.

    Its store and its sockets listen on 127.0.0.1 only. The group is one of its own: the trainer's own groups are not
    touched.
    """

    def __init__(self, deadline_s: float = 120.0) -> None:
        self._deadline = timedelta(seconds=deadline_s)
        self._store: dist.TCPStore | None = None
        self._group: Any = None
        self._world = 0
        self._pending: Any = None

    def open(self, receivers: int) -> dict[str, Any]:
        self._world = receivers + 1
        self._store, port = listen(self._world, self._deadline)
        deadline_s = self._deadline.total_seconds()
        return {
            "transport": "gloo",
            "host": "127.0.0.1",
            "port": port,
            "world_size": self._world,
            "deadline_s": deadline_s,
        }

    def accept(self) -> None:
        assert self._store is not None
        try:
            self._group = gloo_group(self._store, 0, self._world, self._deadline)
        except RuntimeError as error:
            raise ServerError(
                f"the server's {self._world - 1} worker(s) did not join the weight sync: {error}"
            ) from None

    def send(self, bytes_N: torch.Tensor) -> None:
        self.flush()
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._pending = self._group.broadcast([bytes_N], options)

    def flush(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.wait()
            except RuntimeError as error:
                raise ServerError(f"the server's workers stopped receiving weights: {error}") from None

    def close(self) -> None:
        # The last broadcast's handle, too, keeps the sockets open, and the receivers would wait for more until their deadline.
        self._pending = self._group = self._store = None


def gloo_group(store: dist.Store, rank: int, world: int, deadline: timedelta) -> Any:
    """A gloo group that listens on loopback only and belongs to nobody's default group."""
    gloo: Any = dist.ProcessGroupGloo  # its options have no type stubs
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = deadline
    return gloo(dist.PrefixStore("weights", store), rank, world, options)


TRANSPORTS: dict[str, Callable[[float], Transport]] = {
    "gloo": GlooTransport,
    "nccl": NcclTransport,
    "ipc": IpcTransport,
}
"""By name; each is made with the deadline (seconds) of its waits."""
_DISK = "disk:"


def make_transport(name: str, deadline_s: float) -> Transport:
    """name: of `TRANSPORTS`, or "disk:FOLDER". Raises ConfigError, which names those there are."""
    if name.startswith(_DISK):
        return DiskTransport(deadline_s, Path(name.removeprefix(_DISK)))
    if name not in TRANSPORTS:
        known = ", ".join([*sorted(TRANSPORTS), f"{_DISK}FOLDER"])
        raise ConfigError(f"unknown transport {name!r} of weights: expected one of {known}")
    return TRANSPORTS[name](deadline_s)
