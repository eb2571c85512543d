"""Buckets as files, for a server that can't be reached from the trainer but by a folder that both
see.

Each bucket is a safetensors file with one tensor of bytes, written, flushed to the disk and only
then named. So a file that the receiver sees is complete. Numbers go on from sync to sync; the files
of one sync are removed when the next one begins.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lockstep_wire.transports.base import Transport, TransportError, UnusableTransportError, received

TENSOR = "bucket"
_POLL_S = 0.01


def file_name(number: int) -> str:
    return f"{number:08d}.safetensors"


class DiskSender:
    """One sender's folder below `parent`; it goes when the transport is closed."""

    def __init__(self, deadline_s: float, parent: Path) -> None:
        self._deadline_s = deadline_s
        self._parent = parent
        self._folder: Path | None = None
        self._written = self._settled = self._removed = 0

    def open(self, receivers: int) -> dict[str, Any]:
        self.close()
        self._folder = self._parent.resolve() / uuid.uuid4().hex
        self._folder.mkdir(parents=True, mode=0o700)
        return {"transport": "disk", "folder": str(self._folder), "deadline_s": self._deadline_s}

    def accept(self) -> None:
        """Nobody joins: a receiver looks for the files when it needs them."""

    def send(self, bytes_N: torch.Tensor) -> None:
        assert self._folder is not None
        while self._removed < self._settled:  # of the sync before, which the server has loaded
            (self._folder / file_name(self._removed)).unlink()
            self._removed += 1
        path = self._folder / file_name(self._written)
        try:
            _publish(path, bytes_N)
        except (OSError, SafetensorError) as error:
            raise TransportError(f"weights could not be written to {path}: {error}") from None
        self._written += 1

    def flush(self) -> None:
        """Every bucket is on the disk when `send` returns; what was sent so far is one sync."""
        self._settled = self._written

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder, self._written, self._settled, self._removed = None, 0, 0, 0


class DiskReceiver:
    """Reads the files by number. A file that has its name is whole: a broken one was damaged later."""

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        self._folder = Path(info["folder"])
        self.deadline_s = float(info["deadline_s"])
        self._read = 0
        if not self._folder.is_dir():
            raise UnusableTransportError(
                f"{self._folder} does not exist on the server's side: give a folder that both sides see"
            )

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        path = self._folder / file_name(self._read)
        deadline = time.monotonic() + self.deadline_s
        while not path.exists():
            if time.monotonic() > deadline or not self._folder.is_dir():
                raise TransportError(f"{path} did not come within {self.deadline_s:g} s")
            time.sleep(_POLL_S)
        try:
            with safe_open(path, framework="pt") as file:
                stored_N = file.get_tensor(TENSOR)
        except (SafetensorError, OSError) as error:
            raise TransportError(f"{path} is corrupt: {error}") from None
        if stored_N.dtype != torch.uint8 or tuple(stored_N.shape) != tuple(bytes_N.shape):
            raise TransportError(
                f"{path} holds {tuple(stored_N.shape)} {stored_N.dtype}, expected {bytes_N.numel()} bytes"
            )
        bytes_N.copy_(stored_N)
        self._read += 1
        return received

    def close(self) -> None:
        """Nothing to drop: the sender removes its files."""


def _publish(path: Path, bytes_N: torch.Tensor) -> None:
    """Write, fsync, rename, fsync of the folder."""
    staged = path.with_suffix(".part")
    save_file({TENSOR: bytes_N.cpu()}, staged)
    _to_disk(staged)
    staged.rename(path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sender(deadline_s: float, place: str) -> DiskSender:
    if not place:
        raise UnusableTransportError("the transport disk needs a folder: disk:FOLDER")
    return DiskSender(deadline_s, Path(place))


TRANSPORT = Transport(_sender, DiskReceiver)
