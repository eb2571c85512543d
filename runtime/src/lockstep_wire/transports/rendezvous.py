"""The meeting point of a sender and its receivers: a store of their own that only this machine can
reach.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def listen(world: int, deadline: timedelta) -> tuple[dist.TCPStore, dict[str, Any]]:
    """A store for `world` processes on a free port of 127.0.0.1, and what `join` needs."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        world,
        is_master=True,
        timeout=deadline,
        wait_for_workers=False,
        use_libuv=False,
        master_listen_fd=listener.detach(),  # else it would listen on every interface
    )
    return store, {"host": "127.0.0.1", "port": port, "world_size": world, "deadline_s": deadline.total_seconds()}


def join(info: dict[str, Any]) -> dist.TCPStore:
    """The store as a client. Raises RuntimeError at the deadline."""
    return dist.TCPStore(
        info["host"],
        info["port"],
        info["world_size"],
        False,
        timeout=timedelta(seconds=info["deadline_s"]),
        use_libuv=False,
        wait_for_workers=False,
    )
