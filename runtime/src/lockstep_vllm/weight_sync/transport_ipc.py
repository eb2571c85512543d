"""Maps the trainer's buffers by CUDA IPC and copies from them: the receiving side of `lockstep.weight_sync.transport_ipc`.

Unproven on a GPU.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lockstep_vllm.weight_sync.rendezvous import join


def map_shared(handle: list[Any]) -> torch.Tensor:
    """The other process's storage as a tensor of bytes on the same GPU."""
    parts = [base64.b64decode(part["base64"]) if isinstance(part, dict) else part for part in handle]
    storage = torch.UntypedStorage._new_shared_cuda(*parts)
    bytes_N = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return bytes_N.set_(storage, 0, (storage.nbytes(),), (1,))


class IpcTransport:
    """Copies each bucket when it is announced and says so. The trainer's two buffers are mapped once."""

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        self.deadline_s = float(info["deadline_s"])
        self._rank, self._device = rank, device
        self._store: dist.TCPStore | None = join(info)
        self._mapped: dict[str, torch.Tensor] = {}
        self._taken = 0
        self._store.set(f"joined/{rank}", "1")

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        assert self._store is not None
        key = f"bucket/{self._taken}"
        self._store.wait([key], timedelta(seconds=self.deadline_s))
        place = json.loads(self._store.get(key))
        name = json.dumps(place["handle"])
        if name not in self._mapped:
            self._mapped[name] = map_shared(place["handle"])
        if place["nbytes"] != bytes_N.numel():
            raise RuntimeError(f"bucket {self._taken} has {place['nbytes']} bytes, expected {bytes_N.numel()}")
        bytes_N.copy_(self._mapped[name][place["start"] : place["start"] + place["nbytes"]])
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._store.set(f"taken/{self._taken}/{self._rank}", "1")  # the trainer may fill its buffer again from now on
        self._taken += 1
        return _there

    def close(self) -> None:
        self._store = None
        self._mapped.clear()


def _there() -> None:
    """Nothing to wait for: the copy was done when `receive` returned."""
