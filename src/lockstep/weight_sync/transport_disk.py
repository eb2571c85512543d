"""Buckets as files, for a server that can't be reached from the trainer but by a folder that both see.

Each bucket is a safetensors file with one tensor of bytes, written, flushed to the disk and only then given its name: a file that the
receiver sees is whole. Numbers go on from sync to sync; the files of one sync are removed when the next one begins.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lockstep.errors import ServerError

TENSOR = "bucket"


def file_name(number: int) -> str:
    return f"{number:08d}.safetensors"


class DiskTransport:
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
            raise ServerError(f"weights could not be written to {path}: {error}") from None
        self._written += 1

    def flush(self) -> None:
        """Every bucket is on the disk when `send` returns; what was sent so far is one sync."""
        self._settled = self._written

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder, self._written, self._settled, self._removed = None, 0, 0, 0


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
