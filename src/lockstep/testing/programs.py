"""Programs in processes of their own: trainer ranks, and the server's own Python."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.errors import ServerError
from lockstep.process.child import child_env, spawn

MARK = "RESULT "


def probed(
    runtime: Any, probe: Path, *arguments: str, env: Mapping[str, str], log: Path, seconds: float = 200.0
) -> list[Any]:
    """The JSON that the program prints on lines that begin with `RESULT `.

    Raises ServerError if the program fails or takes longer than `seconds`.
    """
    command = [str(runtime.python), str(probe), *arguments]
    child = spawn(command, child_env({"OMP_NUM_THREADS": "1", **env}), log, "the probe")
    if child.wait(seconds) != 0:
        raise ServerError(f"{probe} failed:\n{child.log_tail(30)}")
    lines = child.log_path.read_text().splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]


def torchrun(processes: int, *program: str) -> list[str]:
    """The command that starts a program in several ranks, under the trainer's own launcher.

    program: a script and its arguments, or `-m`, a module and its arguments.
    """
    return [sys.executable, "-W", "ignore", "-m", "lockstep.engine.parallel.launch", str(processes), *program]
