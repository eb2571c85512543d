"""Ties every vLLM process to the one that started it.

vLLM's engine core and workers survive a SIGKILL of the API process. The guard that Lockstep starts
the server under kills them; this is for the case that the guard itself is killed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel for SIGKILL at the parent's death (Linux). Ends at once if a parent that
    spawned this process is already gone.
    """
    parent = multiprocessing.parent_process()
    die_with(None if parent is None else parent.pid)


def die_with(parent_pid: int | None) -> None:
    """The same, where the parent is known."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:  # died in between
        os.kill(os.getpid(), signal.SIGKILL)
