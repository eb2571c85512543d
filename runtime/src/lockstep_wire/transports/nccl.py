"""Weights between GPUs of one machine: broadcasts through a NCCL communicator of their own, built
by torch.

The communicator's id travels through a store on 127.0.0.1. Both sides must run the same NCCL, since
releases don't promise compatibility. On the sender only `accept` and `flush` wait on the host. A
broadcast is queued behind the work that fills its bucket, on a stream of its own, so that filling,
sending and receiving overlap. At a deadline the communicator is aborted, which ends its kernels on
both sides.

Evidence on GPUs: `tests/gpu/test_nccl_sync.py` and `benchmarks/weight_sync.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from lockstep_wire.transports.base import Transport, TransportError, UnusableTransportError
from lockstep_wire.transports.rendezvous import join, listen

_POLL_S = 0.0002
_WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_NEVER = timedelta(days=30)
"""torch's own deadline: past it the process's watchdogs write dumps and may end it. Ours is kept
here, by `abort`.
"""


class NcclSender:
    """Rank 0 of a communicator of one sender and all receivers."""

    def __init__(self, deadline_s: float = 120.0) -> None:
        """Raises UnusableTransportError without a GPU, or with a torch that has no NCCL."""
        if not torch.cuda.is_available() or not dist.is_nccl_available():
            raise UnusableTransportError("transport 'nccl' needs a GPU and a torch with NCCL: use 'gloo' on a CPU")
        self._deadline_s = deadline_s
        self._store: dist.FileStore | None = None
        self._group: Any = None
        self._world = 0
        self._pending: Any = None

    def open(self, receivers: int) -> dict[str, Any]:
        self._world = receivers + 1
        self._store, address = listen(self._world, timedelta(seconds=self._deadline_s))
        return {"transport": "nccl", **address, "nccl": list(nccl_version())}

    def accept(self) -> None:
        assert self._store is not None
        try:
            self._group = nccl_group(self._store, 0, self._world)
            # The communicator is made by its first use: this one, so that a receiver that is
            # missing is missed here.
            self.send(torch.zeros(1, dtype=torch.uint8, device="cuda"))
            self.flush()
        except RuntimeError as error:
            self.close()
            raise TransportError(
                f"the server's {self._world - 1} worker(s) did not join the weight sync: {error}"
            ) from None

    def send(self, bytes_N: torch.Tensor) -> None:
        """Queues the broadcast behind the current stream's work, which then waits for the broadcast
        before this one.
        """
        if self._pending is not None:
            self._pending.wait()
        self._pending = broadcast(self._group, bytes_N)

    def flush(self) -> None:
        if self._pending is None:
            return
        self._pending.wait()
        self._pending = None
        left = torch.cuda.Event()
        left.record()
        if not passed(left, self._deadline_s):
            self.close()
            raise TransportError(
                f"the server's workers did not take the weights within {self._deadline_s:g} s: NCCL was aborted"
            )

    def close(self) -> None:
        group, self._group, self._store, self._pending = self._group, None, None, None
        if group is not None:
            group.abort()


class NcclReceiver:
    """Rank `rank` of the sender's communicator."""

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        """Raises UnusableTransportError when the two sides' NCCL differ, RuntimeError at the
        deadline.
        """
        self.deadline_s = float(info["deadline_s"])
        check_version(info["nccl"])
        self._group: Any = nccl_group(join(info), rank, info["world_size"])
        # The communicator is made by its first use; the sender makes the same.
        self.receive(torch.zeros(1, dtype=torch.uint8, device=device))()
        joined = torch.cuda.Event()
        joined.record()
        if not passed(joined, self.deadline_s):
            self.close()
            raise TransportError(f"no communicator within {self.deadline_s:g} s")

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        return broadcast(self._group, bytes_N).wait  # of the current stream, not of the host

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def nccl_version() -> tuple[int, ...]:
    """Of the NCCL that this process has loaded."""
    return tuple(int(part) for part in nccl.version())


def check_version(sender: list[int]) -> None:
    """Raises UnusableTransportError: releases of NCCL don't promise to speak to each other."""
    here = list(nccl_version())
    if here != sender:
        raise UnusableTransportError(
            f"the trainer has NCCL {'.'.join(map(str, sender))} and the server {'.'.join(map(str, here))}: "
            "install the same torch release in both environments"
        )


@contextmanager
def _own_deadlines() -> Iterator[None]:
    """torch's watchdog would end the process at a timeout; here the caller aborts the communicator
    and says what happened.
    """
    before = os.environ.get(_WATCHDOG)
    os.environ[_WATCHDOG] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WATCHDOG]
        else:
            os.environ[_WATCHDOG] = before


def nccl_group(store: dist.Store, rank: int, world: int) -> Any:
    """A communicator that belongs to nobody's default group."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _NEVER
    # Else filling or landing one bucket would take all processors of the GPU before the next
    # broadcast gets any.
    options.is_high_priority_stream = True
    with _own_deadlines():
        return dist.ProcessGroupNCCL(dist.PrefixStore("weights", store), rank, world, options)


def broadcast(group: Any, bytes_N: torch.Tensor) -> Any:
    """From rank 0; returns torch's handle, whose `wait` lets the current stream wait and not the
    host.
    """
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    options.asyncOp = True
    return group.broadcast([bytes_N], options)


def passed(event: torch.cuda.Event, deadline_s: float) -> bool:
    """Waits until the GPU is past `event`; False at the deadline."""
    end = time.monotonic() + deadline_s
    while not event.query():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True


TRANSPORT = Transport(lambda deadline_s, _: NcclSender(deadline_s), NcclReceiver)
