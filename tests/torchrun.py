"""The command that starts a program in several processes of this machine, as every test that needs ranks does."""

from __future__ import annotations

import sys


def torchrun(processes: int, *program: str) -> list[str]:
    """program: a script and its arguments, or `-m`, a module and its arguments. The port is the machine's choice."""
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*start, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *program]
