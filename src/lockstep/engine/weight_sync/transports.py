"""The transport of a run's weights, by its name, and its errors as Lockstep's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lockstep.errors import ConfigError, ServerError
from lockstep_wire.transports import Sender, TransportError, UnusableTransportError, transports

T = TypeVar("T")


def make_transport(name: str, deadline_s: float) -> Sender:
    """name: of `lockstep_wire.transports`, or "disk:FOLDER".

    Raises ConfigError, which names those there are.
    """
    kind, _, place = name.partition(":")
    if kind not in transports():
        raise ConfigError(f"unknown transport {name!r} of weights: expected one of {', '.join(transports())}")
    return translated(lambda: transports()[kind].sender(deadline_s, place))()


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
