"""Where the programs lie that tests start in processes of their own, and the path on which those find their helpers."""

from __future__ import annotations

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
ENGINE = SUPPORT / "engine"
"""Programs of trainer ranks."""
SERVER = SUPPORT / "server"
"""Programs of the server's Python, and what is put into a server."""


def python_path() -> str:
    """PYTHONPATH with the helpers first."""
    return os.pathsep.join([str(SUPPORT), str(ENGINE), str(SERVER), os.environ.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
