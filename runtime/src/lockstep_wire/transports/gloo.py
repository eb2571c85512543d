"""Broadcasts over gloo on the loopback interface: for CPU and for tests.

Its sockets listen on 127.0.0.1 only. The group is one of its own: neither the trainer's
groups nor vLLM's are touched.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lockstep_wire.transports.base import Transport, TransportError
from lockstep_wire.transports.rendezvous import join, listen, within


class GlooSender:
    """Rank 0 of a group of one sender and all receivers."""

    def __init__(self, deadline_s: float = 120.0) -> None:
        self._deadline = timedelta(seconds=deadline_s)
        self._store: dist.FileStore | None = None
        self._group: Any = None
        self._world = 0
        self._pending: Any = None

    def open(self, receivers: int) -> dict[str, Any]:
        self._world = receivers + 1
        self._store, address = listen(self._world, self._deadline)
        return {"transport": "gloo", **address}

    def accept(self) -> None:
        assert self._store is not None
        try:
            self._group = gloo_group(self._store, 0, self._world, self._deadline)
        except RuntimeError as error:
            raise TransportError(
                f"the server's {self._world - 1} worker(s) did not join the weight sync: {error}"
            ) from None

    def send(self, bytes_N: torch.Tensor) -> None:
        self.flush()
        self._pending = _broadcast(self._group, bytes_N)

    def flush(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.wait()
            except RuntimeError as error:
                raise TransportError(f"the server's workers stopped receiving weights: {error}") from None

    def close(self) -> None:
        # The last broadcast's handle, too, keeps the sockets open, and the receivers would wait for
        # more until their deadline.
        self._pending = self._group = self._store = None


class GlooReceiver:
    """Rank `rank` of that group."""

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        self.deadline_s = float(info["deadline_s"])
        store, deadline = join(info), timedelta(seconds=self.deadline_s)
        self._group: Any = within(
            self.deadline_s + 1.0, "the sender", lambda: gloo_group(store, rank, info["world_size"], deadline)
        )

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        return _broadcast(self._group, bytes_N).wait

    def close(self) -> None:
        self._group = None


def gloo_group(store: dist.Store, rank: int, world: int, deadline: timedelta) -> Any:
    """A gloo group that listens on loopback only and belongs to nobody's default group."""
    gloo: Any = dist.ProcessGroupGloo  # its options have no type stubs
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = deadline
    return gloo(dist.PrefixStore("weights", store), rank, world, options)


def _broadcast(group: Any, bytes_N: torch.Tensor) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([bytes_N], options)


TRANSPORT = Transport(lambda deadline_s, _: GlooSender(deadline_s), GlooReceiver)
