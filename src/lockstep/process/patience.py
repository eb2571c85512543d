"""How long a silence may last before it means that a process hangs: learned from the silences that
ended well.
"""

from __future__ import annotations

FACTOR = 10.0
"""A silence is too long when it lasts this many times the longest one that ended well."""


class Patience:
    """The limit for each kind of work.

    floor_s: no limit is below, in seconds; slow machines and garbage collectors need that much.
    """

    def __init__(self, floor_s: float) -> None:
        self.floor_s = floor_s
        self._longest: dict[str, float] = {}

    def took(self, work: str, silent_s: float) -> None:
        """A silence in `work` that ended well."""
        self._longest[work] = max(silent_s, self._longest.get(work, 0.0))

    def limit_s(self, work: str, unknown_s: float) -> float:
        """Seconds of silence in `work` that mean a hang; `unknown_s` for work not seen before, and
        never more than that.
        """
        if work not in self._longest:
            return unknown_s
        return min(unknown_s, max(self.floor_s, FACTOR * self._longest[work]))
