"""Starts the trainer's ranks on this machine and ends them together.

`python -m lockstep.engine.ranks N ARGUMENTS...` runs Python with these arguments N times, each with its rank in the environment. It stands
in for torch.distributed.run, whose rendezvous store listens on every interface; here that store and gloo's sockets are on loopback.
The guard above us kills the whole tree, so nothing here has to survive a crash.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

LOOPBACK = "127.0.0.1"
GRACE_S = 5.0
"""Seconds between SIGTERM and SIGKILL for the ranks that are left when one has failed."""


def loopback_store(**settings: object) -> dist.TCPStore:
    """A TCPStore server on a free port of the loopback interface; `settings` are TCPStore's own."""
    listener = socket.create_server((LOOPBACK, 0))
    return dist.TCPStore(
        LOOPBACK,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        use_libuv=False,  # libuv's server can't take a socket over
        master_listen_fd=listener.detach(),  # else it would listen on every interface
        **settings,  # type: ignore[arg-type]
    )


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What `init_process_group` and Megatron read, as torch.distributed.run would set it, on loopback."""
    extra = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, rank 0 starts none
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if Path("/sys/class/net/lo").exists():
        extra["GLOO_SOCKET_IFNAME"] = "lo"
    return dict(os.environ) | extra


def main(arguments: list[str]) -> int:
    """Exit status: 0 when every rank ended so, else that of the first one that failed (128 + N after signal N)."""
    ranks, command = int(arguments[0]), [sys.executable, *arguments[1:]]
    store = loopback_store()
    children = {}
    for rank in range(ranks):
        child = subprocess.Popen(command, env=environment(rank, ranks, store.port))
        children[child.pid] = child
    while children:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        ended = children.pop(pid, None)
        if ended is None:
            continue
        ended.returncode = code
        if code:
            sys.stderr.write(f"a trainer rank (process {pid}) ended with status {code}: ending the others\n")
            _end(list(children.values()))
            return code if code > 0 else 128 - code
    return 0


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
