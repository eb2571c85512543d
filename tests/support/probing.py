"""Programs that the server's own Python runs, and what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.process.child import child_env, spawn

MARK = "RESULT "


def probed(
    runtime: Any, probe: Path, *arguments: str, env: Mapping[str, str], log: Path, seconds: float = 200.0
) -> list[Any]:
    """What the program prints as JSON, from its lines that begin with `RESULT `. It must end well, and within that time."""
    command = [str(runtime.python), str(probe), *arguments]
    child = spawn(command, child_env({"OMP_NUM_THREADS": "1", **env}), log, "the probe")
    assert child.wait(seconds) == 0, child.log_tail(30)
    lines = child.log_path.read_text().splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
