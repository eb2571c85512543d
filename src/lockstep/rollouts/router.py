"""Which of several servers (replicas) answers whom.

The rollouts of a group, and the requests of an episode, share a prefix: they stay with one replica
while that lives. Groups choose by rendezvous hashing (Thaler and Ravishankar 1998) among the
replicas whose load is not above the mean (Mirrokni et al. 2016). So a replica that is lost, or comes
back, moves no group that another one serves.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from lockstep.config import deadlines
from lockstep.rollouts.leases import RolloutScope, current_scope
from lockstep.rollouts.noise import current_place

_BOUND = 1.05
"""Most load of a replica that takes another group, as a multiple of the mean."""


@dataclass(frozen=True)
class Replica:
    """One of the servers of a run.

    number: its place; the server that replaces it has the same.
    base_url: ends in `/v1`.
    """

    number: int
    base_url: str
    api_key: str = field(repr=False)


@dataclass
class _Family:
    """Holders of one key, which share a replica."""

    replica: Replica | None = None
    holders: int = 0


class Router:
    """Gives out replicas. Safe to use from several threads.

    replicas: asked at each request; those that serve now, at least one.
    """

    def __init__(self, replicas: Callable[[], Sequence[Replica]]):
        self._replicas = replicas
        self._families: dict[object, _Family] = {}
        self._rests_until: dict[str, float] = {}
        self._scopes: WeakKeyDictionary[RolloutScope, Hold] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def hold(self, body: Mapping[str, Any]) -> Hold:
        """The running rollout's hold, which ends with the rollout. Outside of rollouts, a new one for
        this request, which the caller ends.
        """
        scope = current_scope()
        if scope is None:
            return Hold(self, object(), _beginning(body))
        with self._lock:
            hold = self._scopes.get(scope)
        if hold is None:
            hold = self.hold_of_episode(scope)
            with self._lock:
                self._scopes[scope] = hold
            scope.at_end(hold.end)
        return hold

    def hold_of_episode(self, scope: RolloutScope | None) -> Hold:
        """A hold that stays with the running rollout's group; without one, with nobody else."""
        place = current_place()
        if scope is None or place is None:
            key = scope or object()
            return Hold(self, key, str(id(key)))
        gathered, group = place.group
        return Hold(self, (gathered, group), f"{gathered.name} {group}")

    def anyone(self) -> Replica:
        """Any that serves."""
        hold = self.hold_of_episode(None)
        try:
            return hold.replica()
        finally:
            hold.end()

    def replica(self, key: object, words: str) -> Replica:
        """Where the family of `key` is served now. words: what a new family chooses by."""
        with self._lock:
            now, family = time.monotonic(), self._families[key]
            replicas = list(self._replicas())
            awake = [replica for replica in replicas if self._rests_until.get(replica.base_url, 0.0) <= now] or replicas
            if family.replica not in awake:
                family.replica = None
                family.replica = self._choose(awake, words)
            return family.replica

    def _choose(self, replicas: Sequence[Replica], words: str) -> Replica:
        loads = dict.fromkeys(replicas, 0)
        for family in self._families.values():
            if family.replica in loads:
                loads[family.replica] += family.holders
        most = math.ceil(_BOUND * (sum(loads.values()) + 1) / len(replicas))
        free = [replica for replica, load in loads.items() if load < most]
        return max(free, key=lambda replica: hashlib.blake2b(f"{replica.number} {words}".encode()).digest())

    def broke_off(self, base_url: str) -> bool:
        """The replica at this address gave no answer, and rests until its end is known. Returns
        whether another may answer.
        """
        with self._lock:
            self._rests_until[base_url] = time.monotonic() + deadlines.REPLICA_RESTS_S
            return any(other.base_url != base_url for other in self._replicas())

    def join(self, key: object) -> None:
        """One more holder of `key`."""
        with self._lock:
            self._families.setdefault(key, _Family()).holders += 1

    def leave(self, key: object) -> None:
        """One holder of `key` less."""
        with self._lock:
            family = self._families[key]
            family.holders -= 1
            if not family.holders:
                del self._families[key]


class Hold:
    """The right of an episode, or of one request, to its replica."""

    def __init__(self, router: Router, key: object, words: str):
        self._router, self._key, self._words = router, key, words
        self._open = True
        router.join(key)

    def replica(self) -> Replica:
        """Who answers now: the same one, while it lives."""
        return self._router.replica(self._key, self._words)

    def broke_off(self, base_url: str) -> bool:
        """As the router's."""
        return self._router.broke_off(base_url)

    def end(self) -> None:
        """Harmless when it has ended."""
        if self._open:
            self._open = False
            self._router.leave(self._key)


def _beginning(body: Mapping[str, Any]) -> str:
    """What requests of one conversation have in common: all up to the first words of the user's."""
    body = body.get("request", body)
    messages = body.get("messages")
    if not isinstance(messages, list):
        return str(body.get("prompt") or body.get("input"))
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    return json.dumps(messages[: roles.index("user") + 1 if "user" in roles else len(messages)], default=str)
