"""The transports of buckets from a sender to the server's workers: one connection per sending rank,
the same bytes to every worker.

One file per transport, with both halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lockstep_wire.transports.base import Receiver, Sender, TransportError, UnusableTransportError
from lockstep_wire.transports.disk import DiskReceiver
from lockstep_wire.transports.gloo import GlooReceiver, GlooSender
from lockstep_wire.transports.ipc import IpcReceiver, IpcSender
from lockstep_wire.transports.nccl import NcclReceiver, NcclSender

__all__ = ["RECEIVERS", "SENDERS", "Receiver", "Sender", "TransportError", "UnusableTransportError", "connect"]

MOST_S = 86400.0
"""The longest deadline of a connection's waits."""
SENDERS: dict[str, Callable[[float], Sender]] = {"gloo": GlooSender, "nccl": NcclSender, "ipc": IpcSender}
"""By name; each is made with the deadline (seconds) of its waits. "disk" needs a folder as well:
DiskSender.
"""

RECEIVERS: dict[str, Callable[[dict[str, Any], int, torch.device], Receiver]] = {
    "gloo": GlooReceiver,
    "nccl": NcclReceiver,
    "ipc": IpcReceiver,
    "disk": DiskReceiver,
}


def connect(info: dict[str, Any], rank: int, device: torch.device) -> Receiver:
    """Joins the sender as `rank` (1 and up). Raises ValueError for what can't work, RuntimeError at
    the deadline.
    """
    if not isinstance(info.get("transport"), str) or info["transport"] not in RECEIVERS:
        raise UnusableTransportError(
            f"unknown transport {info.get('transport')!r}: expected one of {', '.join(sorted(RECEIVERS))}"
        )
    deadline_s = info.get("deadline_s")
    if not isinstance(deadline_s, int | float) or not 0 < deadline_s <= MOST_S:
        raise UnusableTransportError(f"deadline_s = {str(deadline_s)[:100]}: give seconds, at most {MOST_S:g}")
    try:
        return RECEIVERS[info["transport"]](info, rank, device)
    except (KeyError, TypeError, OverflowError) as error:
        raise UnusableTransportError(f"{info['transport']}: {type(error).__name__}: {error}") from error
