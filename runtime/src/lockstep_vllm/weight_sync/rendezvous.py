"""The store in which a sender waits for its receivers."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def join(info: dict[str, Any]) -> dist.TCPStore:
    """Joins as a client. Raises RuntimeError at the deadline."""
    return dist.TCPStore(
        info["host"],
        info["port"],
        info["world_size"],
        False,
        timeout=timedelta(seconds=info["deadline_s"]),
        use_libuv=False,
        wait_for_workers=False,
    )
