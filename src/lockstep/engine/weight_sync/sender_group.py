"""The processes that send together. They exchange the outcome of each step, so that none waits for
a process that gave up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from lockstep.errors import LockstepError, TrainerError, error_of
from lockstep_wire.transports.rendezvous import wait_for


class SenderGroup(Protocol):
    """Sender `rank` of `size`. Rank 0 speaks to the server."""

    rank: int
    size: int

    def exchange(self, value: Any, deadline_s: float) -> list[Any]:
        """Everyone's value (JSON), in rank order. Raises TrainerError, which names who is late, at
        the deadline.
        """
        ...


class SingleSender:
    """One sender alone."""

    rank, size = 0, 1

    def exchange(self, value: Any, deadline_s: float) -> list[Any]:
        return [value]


class StoreSenderGroup:
    """A group that meets in a store; every rank exchanges in the same order."""

    def __init__(self, store: dist.Store, rank: int, size: int, name: str = "sync") -> None:
        """name: of the keys of this group, where several groups meet in one store."""
        self.rank, self.size = rank, size
        self._store, self._name, self._count = store, name, 0

    def exchange(self, value: Any, deadline_s: float) -> list[Any]:
        self._count += 1
        keys = [f"{self._name}/{self._count}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        if self._count > 2:  # everyone is past the exchange before the last
            self._store.delete_key(f"{self._name}/{self._count - 2}/{self.rank}")
        if late := wait_for(self._store, keys, deadline_s):
            raise TrainerError(f"sender {keys.index(late[0])} timed out after {deadline_s:g} s in a weight sync")
        return [json.loads(self._store.get(key)) for key in keys]


def run_on_all(senders: SenderGroup, step: Callable[[], Any], deadline_s: float) -> list[Any]:
    """Runs `step` on every rank, and returns what each got. If it failed anywhere, the error that
    came first is raised everywhere: those after it are mostly its consequences.
    """
    value, failure = None, None
    try:
        value = step()
    except LockstepError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 (the others must hear of it, whatever it is)
        failure = TrainerError(f"sender {senders.rank}: {type(error).__name__}: {error}")
    description = None if failure is None else {"type": type(failure).__name__, "message": str(failure)}
    outcomes = senders.exchange({"value": value, "error": description, "at": time.time()}, deadline_s)
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome["error"]]
    if not failed:
        return [outcome["value"] for outcome in outcomes]
    first = min(failed, key=lambda rank: outcomes[rank]["at"])
    if first == senders.rank and failure is not None:
        raise failure
    error = outcomes[first]["error"]
    raise error_of(error["type"], error["message"], TrainerError(error["message"]))
