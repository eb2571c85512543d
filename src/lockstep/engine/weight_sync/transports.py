"""The transport of a run's weights, by its name, and its errors as Lockstep's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lockstep.errors import ConfigError, ServerError
from lockstep_wire.transports import SENDERS, Sender, TransportError, UnusableTransportError
from lockstep_wire.transports.disk import DiskSender

_DISK = "disk:"
T = TypeVar("T")


def make_transport(name: str, deadline_s: float) -> Sender:
    """name: of `SENDERS`, or "disk:FOLDER".

    Raises ConfigError, which names those there are.
    """
    if name.startswith(_DISK):
        return DiskSender(deadline_s, Path(name.removeprefix(_DISK)))
    if name not in SENDERS:
        known = ", ".join([*sorted(SENDERS), f"{_DISK}FOLDER"])
        raise ConfigError(f"unknown transport {name!r} of weights: expected one of {known}")
    return translated(lambda: SENDERS[name](deadline_s))()


def translated(step: Callable[[], T]) -> Callable[[], T]:
    """`step`, whose transport's errors arrive as ServerError or ConfigError."""

    def run() -> T:
        try:
            return step()
        except TransportError as error:
            raise ServerError(str(error)) from None
        except UnusableTransportError as error:
            raise ConfigError(str(error)) from None

    return run
