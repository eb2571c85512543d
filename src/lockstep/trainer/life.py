"""What the trainer's signs of life say while it answers a request: its phase, and how long it has
stood still.
"""

from __future__ import annotations

import time
from typing import Any

from lockstep.config import deadlines
from lockstep.process.patience import Patience


class Signs:
    """Signs of life during one request.

    deadline_s: the longest standstill where nothing is known of the trainer's speed.
    """

    def __init__(self, verb: str, deadline_s: float, patience: Patience) -> None:
        self.verb, self.phase, self.waits_for = verb, "", ""
        self._deadline_s, self._patience = deadline_s, patience
        self._seen: tuple[Any, ...] | None = None
        self._standing_s = 0.0
        self._ranks: list[dict[str, Any]] = []

    def heard(self, event: dict[str, Any]) -> bool:
        """Whether the trainer hangs, after one more sign.

        A standstill is counted in signs and not by this process's clock: a trainer that gets no
        processor time sends none.
        """
        ranks = event.get("ranks") or []
        seen = event.get("phase"), tuple(rank.get("progress") for rank in ranks)
        self._ranks = ranks
        if seen != self._seen:
            self.answered()
            self._seen, self._standing_s = seen, 0.0
            self.phase, self.waits_for = str(event.get("phase", "")), str(event.get("waits_for", ""))
            return False
        if event.get("kind") == "heartbeat":
            self._standing_s += deadlines.HEARTBEAT_S
        return self._standing_s > self._limit_s()

    def answered(self) -> None:
        """The standstill until now ended well."""
        if self._seen is not None:
            self._patience.took(self._work, self._standing_s)

    def described(self, silent_s: float) -> str:
        """`, busy with PHASE for OTHER, since HH:MM:SS (N s): rank 0 at FILE:LINE, ...`."""
        busy = " for ".join(word for word in (self.phase, self.waits_for) if word)
        stands_s = self._standing_s + silent_s
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - stands_s))
        places = ", ".join(f"rank {rank} at {here.get('where', '?')}" for rank, here in enumerate(self._ranks))
        words = f", busy with {busy}" if busy else ""
        return f"{words}, since {since} ({stands_s:.0f} s){': ' + places if places else ''}"

    @property
    def _work(self) -> str:
        return f"{self.verb} {self.phase}"

    def _limit_s(self) -> float:
        if self.waits_for == "the disk":  # one write may take as long as the disk is busy with others
            return self._deadline_s
        limit_s = self._patience.limit_s(self._work, self._deadline_s)
        # A server that hangs is found by its own watch, and is the one to be replaced.
        return min(self._deadline_s, 2 * limit_s) if self.waits_for else limit_s
