"""A Python process that hangs without being stopped: it computes for ever."""

from __future__ import annotations

import signal
from pathlib import Path

LOOP = signal.SIGUSR2
_PLANTED = """
import signal

def endless(number, frame):
    while True:
        pass

signal.signal(signal.SIGUSR2, endless)
"""


def endless_on_signal(folder: Path) -> Path:
    """A folder for PYTHONPATH: each Python process that starts with it hangs in its main thread when it gets LOOP."""
    (folder / "sitecustomize.py").write_text(_PLANTED)
    return folder
