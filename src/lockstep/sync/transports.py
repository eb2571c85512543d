"""How buckets get from the trainer to the server's workers. Rank 0 sends, every worker receives the same bytes."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lockstep.errors import ServerError


class Transport(Protocol):
    """One way to send. `open` and `accept` belong together: the server is told `open`'s answer in between."""

    def open(self, receivers: int) -> dict[str, Any]:
        """Prepares for that many receivers; returns what each needs to connect."""
        ...

    def accept(self) -> None:
        """Waits until every receiver has connected. Raises ServerError at the deadline."""
        ...

    def send(self, bytes_N: torch.Tensor) -> None:
        """Sends a bucket; it may be overwritten once `send` has returned for the bucket after it."""
        ...

    def flush(self) -> None:
        """Waits until every bucket has left. Raises ServerError at the deadline."""
        ...

    def close(self) -> None: ...


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
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            "127.0.0.1",
            port,
            self._world,
            is_master=True,
            timeout=self._deadline,
            wait_for_workers=False,
            use_libuv=False,
            master_listen_fd=listener.detach(),  # else it would listen on every interface
        )
        return {
            "transport": "gloo",
            "host": "127.0.0.1",
            "port": port,
            "world_size": self._world,
            "deadline_s": self._deadline.total_seconds(),
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
        self._group = self._store = None


def gloo_group(store: dist.Store, rank: int, world: int, deadline: timedelta) -> Any:
    """A gloo group that listens on loopback only and belongs to nobody's default group."""
    gloo: Any = dist.ProcessGroupGloo  # its options have no type stubs
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = deadline
    return gloo(dist.PrefixStore("weights", store), rank, world, options)
