"""The command that starts a program in several processes of this machine, as every test that needs ranks does."""

from __future__ import annotations

import sys


def torchrun(processes: int, *program: str) -> list[str]:
    """program: a script and its arguments, or `-m`, a module and its arguments. The launcher is the trainer's own."""
    return [sys.executable, "-W", "ignore", "-m", "lockstep.engine.parallel.launch", str(processes), *program]
