"""How a worker gets buckets from one sender: the receiving side of `lockstep.weight_sync.transports`."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lockstep_vllm.weight_sync.rendezvous import join
from lockstep_vllm.weight_sync.transport_disk import DiskTransport
from lockstep_vllm.weight_sync.transport_ipc import IpcTransport
from lockstep_vllm.weight_sync.transport_nccl import NcclTransport


class Transport(Protocol):
    """One connection to one sender. deadline_s: of its waits."""

    deadline_s: float

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        """Starts to fill a bucket. After the returned call the bytes are there for what is queued on the current stream.

        Both raise RuntimeError at the deadline, or when the sender is gone.
        """
        ...

    def close(self) -> None:
        """Drops the connection, at once and for good; harmless twice."""
        ...


class GlooTransport:
    """Broadcasts from rank 0 over gloo on loopback; a group of its own, vLLM's are not touched."""

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        self.deadline_s = float(info["deadline_s"])
        deadline = timedelta(seconds=self.deadline_s)
        gloo: Any = dist.ProcessGroupGloo  # its options have no type stubs
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = deadline
        store = join(info)
        self._group: Any = gloo(dist.PrefixStore("weights", store), rank, info["world_size"], options)

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        work = self._group.broadcast([bytes_N], options)

        def wait() -> None:
            work.wait()

        return wait

    def close(self) -> None:
        self._group = None


_TRANSPORTS: dict[str, Callable[[dict[str, Any], int, torch.device], Transport]] = {
    "gloo": GlooTransport,
    "nccl": NcclTransport,
    "ipc": IpcTransport,
    "disk": DiskTransport,
}


def connect(info: dict[str, Any], rank: int, device: torch.device) -> Transport:
    """Joins the sender as `rank` (1 and up). Raises ValueError for what can't work, RuntimeError at the deadline."""
    if info["transport"] not in _TRANSPORTS:
        raise ValueError(f"unknown transport {info['transport']!r}: expected one of {', '.join(sorted(_TRANSPORTS))}")
    return _TRANSPORTS[info["transport"]](info, rank, device)
