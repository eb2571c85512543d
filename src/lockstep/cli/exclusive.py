"""A lock file that one process of this machine holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lockstep.errors import StoreError


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file. Raises StoreError, which begins with `otherwise`, if another process does."""
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise StoreError(f"{otherwise}: wait for it, stop it, or choose another path or name") from None
