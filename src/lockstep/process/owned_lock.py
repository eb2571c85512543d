"""A lock file that one process of this machine holds, and that shows the others who holds it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout


class LockHeldError(Exception):
    """Another process holds the lock; the message says which, as far as it is known."""


def take(lock: Path) -> FileLock:
    """The lock, held until its `release`. Raises LockHeldError if another process holds it, OSError
    where no file can be made.
    """
    taken = FileLock(lock)
    owner = lock.with_name(f"{lock.name}.owner")
    try:
        taken.acquire(timeout=0)
    except Timeout:
        raise LockHeldError(_described(owner)) from None
    # Not in the lock file: whoever tries to take the lock may empty that.
    started = Path(sys.argv[0])
    program = (started.parent if started.name == "__main__.py" else started).name
    owner.write_text(json.dumps({"pid": os.getpid(), "program": program, "since": time.time()}))
    return taken


def _described(owner: Path) -> str:
    try:
        identity = json.loads(owner.read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(identity["since"]))
        return f"process {identity['pid']} ({identity['program']}), since {since}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock, or lies on a full disk
        return "another process"
