"""How a worker gets buckets from the trainer: the receiving side of `lockstep.sync.transports`."""

# pyright: reportMissingImports=false

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lockstep_vllm.transport_disk import DiskTransport
from lockstep_vllm.transport_ipc import IpcTransport


class Transport(Protocol):
    """One connection to the sender."""

    def receive(self, bytes_N: torch.Tensor) -> None:
        """Fills a bucket. Raises RuntimeError at the deadline or when the sender is gone."""
        ...

    def close(self) -> None: ...


class GlooTransport:
    """Broadcasts from rank 0 over gloo on loopback; a group of its own, vLLM's are not touched."""

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        deadline = timedelta(seconds=info["deadline_s"])
        store = dist.TCPStore(
            info["host"],
            info["port"],
            info["world_size"],
            False,
            timeout=deadline,
            use_libuv=False,
            wait_for_workers=False,
        )
        gloo: Any = dist.ProcessGroupGloo  # its options have no type stubs
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = deadline
        self._group = gloo(dist.PrefixStore("weights", store), rank, info["world_size"], options)

    def receive(self, bytes_N: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([bytes_N], options).wait()

    def close(self) -> None:
        del self._group


_TRANSPORTS = {"gloo": GlooTransport, "disk": DiskTransport, "ipc": IpcTransport}


def connect(info: dict[str, Any], rank: int, device: torch.device) -> Any:
    """Joins the sender as `rank` (1 and up)."""
    if info["transport"] not in _TRANSPORTS:
        raise ValueError(f"unknown transport {info['transport']!r}: expected one of {', '.join(sorted(_TRANSPORTS))}")
    return _TRANSPORTS[info["transport"]](info, rank, device)
