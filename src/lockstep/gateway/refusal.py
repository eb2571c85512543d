"""What a request gets in place of a reply."""

from __future__ import annotations

from lockstep_wire.short_text import shortened


class Refusal(Exception):
    """A request that can't be answered. status: HTTP's. The text is one line for the agent's author."""

    def __init__(self, status: int, message: str):
        super().__init__(shortened(message))
        self.status = status
