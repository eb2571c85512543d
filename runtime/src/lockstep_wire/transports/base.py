"""One way for buckets to travel: the half of a sender, the half of a receiver, and the errors of
both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class TransportError(RuntimeError):
    """The other side is gone, did not come, or missed a deadline."""


class UnusableTransportError(ValueError):
    """This transport can't work here: no GPU, another NCCL, a folder that one side does not see."""


class Sender(Protocol):
    """One sender's half. `open` and `accept` belong together: the receivers get `open`'s answer in
    between.
    """

    def open(self, receivers: int) -> dict[str, Any]:
        """Prepares for that many receivers; returns what each needs to connect, as JSON."""
        ...

    def accept(self) -> None:
        """Waits until every receiver has connected. Raises TransportError at the deadline."""
        ...

    def send(self, bytes_N: torch.Tensor) -> None:
        """Sends a bucket. The buffer may be reused by work that is queued after the next `send`
        returns.
        """
        ...

    def flush(self) -> None:
        """Waits until every bucket has left. Raises TransportError at the deadline."""
        ...

    def close(self) -> None:
        """Drops the connection; harmless twice."""
        ...


class Receiver(Protocol):
    """A worker's half: one connection to one sender.

    deadline_s: of its waits.
    """

    deadline_s: float

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        """Starts to fill a bucket. After the returned call the bytes are there for what is queued
        on the current stream.

        Both raise RuntimeError at the deadline, or when the sender is gone.
        """
        ...

    def close(self) -> None:
        """Drops the connection, at once and for good; harmless twice."""
        ...


@dataclass(frozen=True)
class Transport:
    """Both halves of a transport.

    sender: of the deadline (seconds) of its waits, and of the place that a user gave after the
        transport's name and a colon; "" for none.
    receiver: of what `Sender.open` returned, the worker's rank (1 and up) and device.
    """

    sender: Callable[[float, str], Sender]
    receiver: Callable[[dict[str, Any], int, torch.device], Receiver]


def received() -> None:
    """The result of `receive` when the copy is already done: nothing to wait for."""
