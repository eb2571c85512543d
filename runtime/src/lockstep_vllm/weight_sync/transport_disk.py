"""Buckets as files in a folder that trainer and server both see: the receiving side of `lockstep.weight_sync.transport_disk`."""

# pyright: reportMissingImports=false

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_TENSOR = "bucket"
_POLL_S = 0.01


class DiskTransport:
    """Reads the files by number. A file that has its name is whole: one that isn't was damaged later."""

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        self._folder = Path(info["folder"])
        self.deadline_s = float(info["deadline_s"])
        self._read = 0
        if not self._folder.is_dir():
            raise ValueError(f"{self._folder} does not exist on the server's side: give a folder that both sides see")

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        path = self._folder / f"{self._read:08d}.safetensors"
        deadline = time.monotonic() + self.deadline_s
        while not path.exists():
            if time.monotonic() > deadline or not self._folder.is_dir():
                raise RuntimeError(f"{path} did not come within {self.deadline_s:g} s")
            time.sleep(_POLL_S)
        try:
            with safe_open(path, framework="pt") as file:
                stored_N = file.get_tensor(_TENSOR)
        except (SafetensorError, OSError) as error:
            raise RuntimeError(f"{path} is torn: {error}") from None
        if stored_N.dtype != torch.uint8 or tuple(stored_N.shape) != tuple(bytes_N.shape):
            raise RuntimeError(
                f"{path} holds {tuple(stored_N.shape)} {stored_N.dtype}, expected {bytes_N.numel()} bytes"
            )
        bytes_N.copy_(stored_N)
        self._read += 1
        return _there

    def close(self) -> None:
        """Nothing to drop: the sender removes its files."""


def _there() -> None:
    """Nothing to wait for: the copy was done when `receive` returned."""
