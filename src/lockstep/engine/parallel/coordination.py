"""Coordination of ranks: requests and failures travel as keys in a store, never in a collective
that could hang.

The store is a file in a folder that only this user can enter (`ranks.py`), so nobody else reads a
request or commands a rank.

A rank that fails while others wait inside a collective cannot wake them. So each rank posts its
outcome, and a watchdog thread on each rank sees a failure. If the rank does not return within a
grace period, its process ends, loudly.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lockstep.config import deadlines
from lockstep.engine.parallel.launch import rank_store
from lockstep.errors import ConfigError
from lockstep_wire.transports.rendezvous import wait_for

POLL_S = 0.5
LOST = 13
"""Exit status of a rank that gave up waiting for itself."""


class Agreement:
    """Requests from rank 0 to all, outcomes from all to all."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        store, watch = rank_store("requests"), rank_store("requests")
        if store is None or watch is None:
            raise ConfigError(
                "ranks agree in a private folder: start them with `python -m lockstep.engine.parallel.launch`"
            )
        self.store = store
        # A blocked wait holds its client, so the watchdog has one of its own.
        self.watch = watch

    def publish(self, number: int, request: dict[str, Any]) -> None:
        self.store.set(f"request/{number}", json.dumps(request))

    def await_request(self, number: int) -> dict[str, Any]:
        """The next request, however long it takes; the launcher ends this rank when rank 0 is gone."""
        while not self.store.check([f"request/{number}"]):
            time.sleep(0.02)
        return json.loads(self.store.get(f"request/{number}"))

    def settle(self, number: int, error: dict[str, str] | None, timeout_s: float) -> dict[str, str] | None:
        """Post this rank's outcome and wait for all others'. The first rank's error, or None when
        all went well.
        """
        if error is not None:
            self.store.set(f"failed/{number}", json.dumps(error))
        self.store.set(f"outcome/{number}/{self.rank}", json.dumps(error))
        keys = [f"outcome/{number}/{rank}" for rank in range(self.world)]
        wait_s = deadlines.LOST_RANK_S if error is not None else timeout_s
        if missing := wait_for(self.store, keys, wait_s):
            late = [keys.index(key) for key in missing]
            message = f"ranks {late} did not finish within {wait_s:.0f} s"
            cause = f" after rank {self.rank} failed: {error['message']}" if error else ""
            return {
                "type": "TrainerLostError",
                "message": message + cause,
                "traceback": (error or {}).get("traceback", ""),
                "fatal": "yes",
            }
        outcomes = [json.loads(self.store.get(key)) for key in keys]
        return next((outcome for outcome in outcomes if outcome is not None), None)

    def forget(self, number: int) -> None:
        """Drop the keys of an old request (called by rank 0 when everyone is past it)."""
        for key in [f"request/{number}", *(f"outcome/{number}/{rank}" for rank in range(self.world))]:
            self.store.delete_key(key)

    @contextmanager
    def watched(self, number: int, timeout_s: float, give_up: Callable[[str], None]):
        """Run a verb under the watchdog: `give_up(why)` then exit, if it outlives its deadline or
        another rank's failure.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(number, timeout_s, give_up, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, number: int, timeout_s: float, give_up: Callable[[str], None], done: threading.Event) -> None:
        deadline, failed_at = time.monotonic() + timeout_s, None
        while not done.wait(POLL_S):
            now = time.monotonic()
            if failed_at is None and self.world > 1 and self.watch.check([f"failed/{number}"]):
                failed_at = now
            if now > deadline:
                give_up(f"the verb did not finish within {timeout_s:.0f} s")
                os._exit(LOST)
            if failed_at is not None and now > failed_at + deadlines.LOST_RANK_S:
                failure = json.loads(self.watch.get(f"failed/{number}"))
                give_up(f"another rank failed: {failure['message']}")
                os._exit(LOST)
