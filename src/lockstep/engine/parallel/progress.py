"""How far this process has come, as a count: one that stands still means that the process hangs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """count: of layers and micro-batches run forward or backward, and of pieces of a step's folder
    written or read."""

    count: int = 0

    def tick(self, *_what: object) -> None:
        """One piece of work is done; also a hook of a tensor, which leaves the gradient as it is."""
        self.count += 1


progress = Progress()
