"""Temporary folders of ours whose owner is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from lockstep.process.guard import LOCK, PREFIX


def remove_abandoned() -> None:
    """Remove this user's folders in TMPDIR whose lock nobody holds: what made them was killed, and
    its guard, too.

    A lock decides, not a process id: programs in other containers may share the folder.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, in use, or just cleared away by somebody else
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
