"""Buckets that stay in place: the server's workers map the trainer's two buffers by CUDA IPC, on
the same host and GPU.

The handle of each buffer travels once. Then "bucket n is ready" and "worker r has taken it" travel
as JSON through a store of this user's. No pickle: a handle is plain bytes and numbers. Evidence on a
GPU: the runs on shared GPUs in `benchmarks/README.md`.

Handles are those of torch 2.11 to 2.13 (`UntypedStorage._share_cuda_`); another torch is refused
where its handles look different.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lockstep_wire.transports.base import Transport, TransportError, UnusableTransportError, received
from lockstep_wire.transports.rendezvous import join, listen, wait_for

HANDLE_PARTS = 8
"""Device, memory handle, bytes, offset, counter's handle and offset, event's handle, whether to
wait for the event.
"""


def share(buffer: torch.Tensor) -> list[Any]:
    """The data that another process needs to map `buffer`'s storage: bytes as base64, the rest as
    it is. Raises UnusableTransportError off a GPU.
    """
    if buffer.device.type != "cuda":
        raise UnusableTransportError(
            f"weights on {buffer.device} can't travel by 'ipc', which maps GPU memory: use 'gloo' or 'disk'"
        )
    parts = buffer.untyped_storage()._share_cuda_()
    if len(parts) != HANDLE_PARTS:
        raise UnusableTransportError(
            f"torch {torch.__version__} shares GPU memory in another way than 'ipc' knows: use 'nccl' or 'disk'"
        )
    return [{"base64": base64.b64encode(part).decode()} if isinstance(part, bytes) else part for part in parts]


class IpcSender:
    """Sends by reference. A bucket's buffer is free again when every worker has copied it."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._store: dist.FileStore | None = None
        self._receivers = 0
        self._shared: dict[int, list[Any]] = {}
        self._sent = self._taken = 0

    def open(self, receivers: int) -> dict[str, Any]:
        self.close()
        self._receivers = receivers
        self._store, address = listen(receivers + 1, timedelta(seconds=self._deadline_s))
        return {"transport": "ipc", **address}

    def accept(self) -> None:
        self._wait("joined")

    def send(self, bytes_N: torch.Tensor) -> None:
        """Announces the bucket, then waits until the one before it was taken."""
        assert self._store is not None
        storage = bytes_N.untyped_storage()
        address = storage.data_ptr()
        if address not in self._shared:
            self._shared[address] = share(bytes_N)
        if bytes_N.is_cuda:
            torch.cuda.current_stream(bytes_N.device).synchronize()  # the bucket is filled
        place = {"handle": self._shared[address], "start": bytes_N.storage_offset(), "nbytes": bytes_N.numel()}
        self._store.set(f"bucket/{self._sent}", json.dumps(place))
        self._sent += 1
        self._wait_taken(self._sent - 1)

    def flush(self) -> None:
        self._wait_taken(self._sent)

    def close(self) -> None:
        self._store = None
        self._shared.clear()
        self._sent = self._taken = 0

    def _wait_taken(self, until: int) -> None:
        assert self._store is not None
        while self._taken < until:
            self._wait(f"taken/{self._taken}")
            self._store.delete_key(f"bucket/{self._taken}")
            self._taken += 1

    def _wait(self, key: str) -> None:
        """Until every worker has set its own `key`. Raises TransportError at the deadline."""
        assert self._store is not None
        keys = [f"{key}/{rank}" for rank in range(1, self._receivers + 1)]
        if missing := wait_for(self._store, keys, self._deadline_s):
            late = ", ".join(missing)
            raise TransportError(f"the server's workers did not answer within {self._deadline_s:g} s ({late})")
        for name in keys:
            self._store.delete_key(name)


def map_shared(handle: list[Any]) -> torch.Tensor:
    """The other process's storage as a tensor of bytes on the same GPU."""
    parts = [base64.b64decode(part["base64"]) if isinstance(part, dict) else part for part in handle]
    storage = torch.UntypedStorage._new_shared_cuda(*parts)
    bytes_N = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return bytes_N.set_(storage, 0, (storage.nbytes(),), (1,))


class IpcReceiver:
    """Copies each bucket when it is announced and says so. The trainer's two buffers are mapped
    once.
    """

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        self.deadline_s = float(info["deadline_s"])
        self._rank, self._device = rank, device
        self._store: dist.FileStore | None = join(info)
        self._mapped: dict[str, torch.Tensor] = {}
        self._taken = 0
        self._store.set(f"joined/{rank}", "1")

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        assert self._store is not None
        key = f"bucket/{self._taken}"
        if wait_for(self._store, [key], self.deadline_s):
            raise TransportError(f"bucket {self._taken} was not announced within {self.deadline_s:g} s")
        place = json.loads(self._store.get(key))
        name = json.dumps(place["handle"])
        if name not in self._mapped:
            self._mapped[name] = map_shared(place["handle"])
        if place["nbytes"] != bytes_N.numel():
            raise TransportError(f"bucket {self._taken} has {place['nbytes']} bytes, expected {bytes_N.numel()}")
        bytes_N.copy_(self._mapped[name][place["start"] : place["start"] + place["nbytes"]])
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._store.set(f"taken/{self._taken}/{self._rank}", "1")  # the trainer may fill its buffer again from now on
        self._taken += 1
        return received

    def close(self) -> None:
        self._store = None
        self._mapped.clear()


TRANSPORT = Transport(lambda deadline_s, _: IpcSender(deadline_s), IpcReceiver)
