"""How far this process has come, as a count: one that stands still means that the process hangs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """count: of micro-batches run forward or backward, and of pieces of a step's folder written or read."""

    count: int = 0


progress = Progress()
