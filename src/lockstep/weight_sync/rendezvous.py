"""Where a sender and its receivers meet: a store of their own that only this machine can reach."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist


def listen(world: int, deadline: timedelta) -> tuple[dist.TCPStore, int]:
    """A store for `world` processes on a free port of 127.0.0.1, and the port."""
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
    return store, port
