"""Refusals that come before any process: what `pytest.raises` says of the message, and this of the time and the processes."""

from __future__ import annotations

import asyncio
import subprocess
import time
from contextlib import contextmanager

import pytest

from lockstep.errors import ConfigError

SECONDS = 5.0


@contextmanager
def refused_at_once(says: str, error: type[Exception] = ConfigError):
    """The body raises `error` with `says` (a pattern) in one line, within 5 s, and starts no process."""
    started: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))
        patch.setattr(asyncio, "create_subprocess_exec", lambda *command, **_: started.append(command))
        begun = time.monotonic()
        with pytest.raises(error, match=says) as caught:
            yield caught
        assert time.monotonic() - begun < SECONDS
    assert not started
    assert "\n" not in str(caught.value)
