"""Waiting for a GPU with a deadline, from a thread that must not hang."""

from __future__ import annotations

import time

import torch

_POLL_S = 0.0002


def passed(event: torch.cuda.Event, deadline_s: float) -> bool:
    """Waits until the GPU is past `event`; False at the deadline."""
    end = time.monotonic() + deadline_s
    while not event.query():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True
