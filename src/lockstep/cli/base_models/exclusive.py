"""A lock file that one process of this machine holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lockstep.errors import StoreError
from lockstep.process.owned_lock import LockHeldError, take


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file. Raises StoreError, which begins with `otherwise`, if another process does."""
    try:
        path_lock = take(lock)
    except LockHeldError as owner:
        raise StoreError(f"{otherwise}, {owner}: wait for it, stop it, or choose another path or name") from None
    with path_lock:
        yield
