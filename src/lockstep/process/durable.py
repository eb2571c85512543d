"""Files that are there whole or not at all, and files that a crash of the machine leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(folder: Path) -> None:
    """Flush a folder and the files in it."""
    for path in (*folder.iterdir(), folder):
        fsync(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. When the block ends, the file is flushed and takes the place
    of `path`; where the block fails, nothing of the file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk leaves half of it


def write_whole(path: Path, text: str) -> Path:
    """Write a text file, all of it or nothing. Returns `path`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
