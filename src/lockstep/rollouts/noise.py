"""The sampling noise of rollouts: each request has a seed that follows from where the request
stands in the run.

Without a seed a server draws one stream of noise in the order of its batches, which no two runs
repeat. With a seed per request a run that was killed and resumed samples what the undisturbed run
samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary

_SEED_BYTES = 6
"""JSON readers keep whole numbers up to 53 bits, and vLLM adds a choice's index to the seed."""


def seed_of(words: str) -> int:
    """The seed that follows from `words`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=_SEED_BYTES).digest())


@dataclass(frozen=True)
class Noise:
    """The noise of one group, whichever step samples it: that of group `group` of a call named
    `name` at step `step`.
    """

    name: str
    step: int
    group: int


class GatherCall:
    """One call of gather. Calls of one name at one step sample the same noise; without a name each
    call has its own.

    step: in the place of the model's; None: the model's.
    """

    def __init__(self, name: str | None = None, step: int | None = None):
        self.name, self.step = name, step


class RolloutPlace:
    """The position of a rollout: its outermost gather, its group, its number, and the gathers
    inside.
    """

    def __init__(self, gather: GatherCall, path: tuple[str, ...]):
        self.gather = gather
        self._path = path
        self._requests = self._gathers = 0

    @property
    def group(self) -> tuple[GatherCall, str]:
        """The group of the outermost gather that the rollout belongs to."""
        return self.gather, self._path[0].rpartition(".")[0]

    def next_request(self) -> str:
        """A name of the rollout's next request, unlike those of all others under the same gather."""
        self._requests += 1
        return f"{'/'.join(self._path)}/{self._requests}"

    def inner_gather(self) -> tuple[str, ...]:
        """The path of a gather that the rollout calls itself."""
        self._gathers += 1
        return (*self._path, f"gather {self._gathers}")

    def below(self, inner: tuple[str, ...], group: int, rollout: int) -> RolloutPlace:
        return RolloutPlace(self.gather, (*inner, f"{group}.{rollout}"))


_place: ContextVar[RolloutPlace | None] = ContextVar("lockstep_rollout_place", default=None)


class Gathered:
    """Gives the rollouts of one call of gather their places."""

    def __init__(self, noise: str | Noise | None):
        self._outer = _place.get()
        self._inner = self._outer.inner_gather() if self._outer is not None else ()
        fixed = isinstance(noise, Noise)
        self._call = GatherCall(noise.name, noise.step) if fixed else GatherCall(noise)
        self._first = noise.group if fixed else 0

    @contextmanager
    def rollout(self, group: int, rollout: int) -> Iterator[None]:
        """Around one rollout: the tasks that the rollout starts share its place."""
        if self._outer is not None:
            place = self._outer.below(self._inner, group, rollout)
        else:
            place = RolloutPlace(self._call, (f"{self._first + group}.{rollout}",))
        token = _place.set(place)
        try:
            yield
        finally:
            _place.reset(token)


def current_place() -> RolloutPlace | None:
    """The running rollout's place; None outside of rollouts."""
    return _place.get()


class RequestSeeds:
    """The seeds of one model's requests, since the model was registered."""

    def __init__(self) -> None:
        self._calls: WeakKeyDictionary[GatherCall, dict[int, str]] = WeakKeyDictionary()
        self._counted: Counter[int] = Counter()

    def draw(self, seed: int, step: int, place: RolloutPlace) -> int:
        """The seed of a rollout's next request, while the model is at `step` of a run with `seed`."""
        step = step if place.gather.step is None else place.gather.step
        return seed_of(f"{seed}/{step}/{self._named(place.gather, step)}/{place.next_request()}")

    def _named(self, call: GatherCall, step: int) -> str:
        """The call's name, or which one of the step it is."""
        if call.name is not None:
            return f"named {call.name}"
        steps = self._calls.setdefault(call, {})
        if step not in steps:
            self._counted[step] += 1
            steps[step] = str(self._counted[step])
        return steps[step]
