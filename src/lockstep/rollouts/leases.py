"""The served versions that running rollouts still use, so that none of them is unloaded.

A rollout runs in a scope. The first `model.inference_name()` inside it pins the model's current
step for the full scope, whatever training does. The end of the scope releases the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Leases:
    """The number of scopes that hold each step of one model."""

    def __init__(self) -> None:
        self._held: Counter[int] = Counter()

    def steps(self) -> frozenset[int]:
        return frozenset(self._held)

    def take(self, step: int) -> None:
        self._held[step] += 1

    def give_back(self, step: int) -> None:
        self._held[step] -= 1
        if self._held[step] == 0:
            del self._held[step]


class RolloutScope:
    """The lease of one rollout. Tasks that the rollout starts share its scope."""

    def __init__(self) -> None:
        self._pinned: dict[Leases, int] = {}
        self._taken: set[tuple[Leases, int]] = set()
        self._at_end: list[Callable[[], None]] = []
        self.open = True
        self.served = False
        """A request of this rollout has had its slot in the server. Its next requests go before
        those of rollouts that have not begun.
        """

    def pin(self, leases: Leases, current: int) -> int:
        """The step this scope uses of that model: the current one at the first call, the same ever
        after.
        """
        step = self._pinned.setdefault(leases, current)
        self.hold(leases, step)
        return step

    def pinned(self, leases: Leases, current: int) -> int:
        """The step that `pin` fixed for that model, the current one before any call. Fixes nothing."""
        return self._pinned.get(leases, current)

    def hold(self, leases: Leases, step: int) -> None:
        """Keep `step` loaded until the scope ends."""
        if (leases, step) not in self._taken:
            self._taken.add((leases, step))
            leases.take(step)

    def at_end(self, act: Callable[[], None]) -> None:
        """Call `act` when the scope ends."""
        self._at_end.append(act)

    def close(self) -> None:
        self.open = False
        for act in self._at_end:
            act()
        for leases, step in self._taken:
            leases.give_back(step)
        self._taken.clear()


_current: ContextVar[RolloutScope | None] = ContextVar("lockstep_rollout_scope", default=None)


def current_scope() -> RolloutScope | None:
    """The running rollout's scope; None outside of one, or when it has ended (a task left over by a
    rollout).
    """
    scope = _current.get()
    return scope if scope is not None and scope.open else None


@contextmanager
def rollout_scope() -> Iterator[RolloutScope]:
    """Run one rollout. An open scope around it is used, not replaced."""
    outer = current_scope()
    if outer is not None:
        yield outer
        return
    scope = RolloutScope()
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)
        scope.close()
