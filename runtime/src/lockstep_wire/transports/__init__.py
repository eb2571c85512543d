"""The transports of buckets from a sender to the server's workers: one connection per sending rank,
the same bytes to every worker.

One file per transport in this folder, with both halves and its `TRANSPORT`.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lockstep_wire.transports.base import Receiver, Sender, Transport, TransportError, UnusableTransportError

__all__ = ["Receiver", "Sender", "TransportError", "UnusableTransportError", "connect", "transports"]

MOST_S = 86400.0
"""The longest deadline of a connection's waits."""
_SHARED = ("__init__", "base", "rendezvous")


@cache
def transports() -> dict[str, Transport]:
    """By name: the `TRANSPORT` of each module in this folder."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _SHARED)
    return {name: importlib.import_module(f"{__name__}.{name}").TRANSPORT for name in names}


def connect(info: dict[str, Any], rank: int, device: torch.device) -> Receiver:
    """Joins the sender as `rank` (1 and up). Raises ValueError for what can't work, RuntimeError at
    the deadline.
    """
    name = info.get("transport")
    if not isinstance(name, str) or name not in transports():
        raise UnusableTransportError(f"unknown transport {name!r}: expected one of {', '.join(transports())}")
    deadline_s = info.get("deadline_s")
    if not isinstance(deadline_s, int | float) or not 0 < deadline_s <= MOST_S:
        raise UnusableTransportError(f"deadline_s = {str(deadline_s)[:100]}: give seconds, at most {MOST_S:g}")
    try:
        return transports()[name].receiver(info, rank, device)
    except (KeyError, TypeError, OverflowError) as error:
        raise UnusableTransportError(f"{name}: {type(error).__name__}: {error}") from error
