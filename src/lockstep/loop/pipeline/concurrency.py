"""How many rollouts run at once: more while the server's KV cache has room, fewer at once when it
is full.

Additive increase, multiplicative decrease, as in TCP's congestion control (Chiu and Jain 1989): it
settles where the cache is used and nothing is preempted.
"""

from __future__ import annotations

ROOMY = 0.8
"""Share of the KV cache in use below which one more group may start."""
FULL = 0.95
"""Share from which rollouts are taken away."""
CUT = 0.75
"""What is left of the rollouts then."""
EVERY_S = 2.0
"""Between two looks at the server."""


class Concurrency:
    """The number of rollouts at once.

    least, most: the limits.
    step: rollouts that one increase adds.
    """

    def __init__(self, least: int, most: int, step: int):
        self.least, self.most, self.step = min(least, most), most, step
        self.now = max(self.least, most // 2)
        self.kv_use = self.preempted = 0.0
        """Since `seen`: the largest share, and the preemptions."""
        self._preemptions: float | None = None

    def seen(self) -> dict[str, float]:
        """What the looks since the last call saw, as metrics."""
        seen = {"kv_use": self.kv_use, "preemptions": self.preempted, "rollouts_at_once": float(self.now)}
        self.kv_use = self.preempted = 0.0
        return seen

    def update(self, kv_use: float, preemptions: float, busy: bool) -> int:
        """The number of rollouts from now on.

        kv_use: share of the KV cache in use.
        preemptions: in the server's life.
        busy: every rollout that may run does; else more would change nothing.
        """
        before = preemptions if self._preemptions is None else self._preemptions
        preempted = max(0.0, preemptions - before)  # a server that was lost takes its count along
        self._preemptions = preemptions
        self.kv_use, self.preempted = max(self.kv_use, kv_use), self.preempted + preempted
        if preempted or kv_use >= FULL:
            self.now = max(self.least, int(self.now * CUT))
        elif busy and kv_use < ROOMY:
            self.now = min(self.most, self.now + self.step)
        return self.now
