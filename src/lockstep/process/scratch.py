"""Folders: made where a user asked for them, and temporary ones of ours whose owner is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from lockstep.errors import ConfigError
from lockstep.process.guard import LOCK, PREFIX


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder that a user named, and those above it.

    Raises ConfigError, naming the setting, where that is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{setting}: {folder} can't be made: {error.strerror}; choose another folder") from None


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
