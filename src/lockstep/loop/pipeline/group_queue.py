"""What the asynchronous loop has drawn: groups under way, groups ready to be trained, and those to
draw again.

Plain bookkeeping without tasks or clocks. A group is drawn, and then trained once or drawn again.
Groups are trained in the order in which they were drawn, but `window` later ones may overtake a
slow one (windowed first in, first out).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from lockstep.rollouts.trajectory import TrajectoryGroup


@dataclass(frozen=True)
class Draw:
    """number: the order in which groups are drawn.
    position: in the run's endless list of scenarios.
    attempt: how often the position was drawn before.
    """

    number: int
    position: int
    attempt: int = 0


@dataclass(frozen=True)
class Ready:
    """A finished group.

    oldest: the step that sampled its oldest token; None where nothing was sampled.
    seconds: from its draw until it was finished.
    """

    draw: Draw
    group: TrajectoryGroup
    oldest: int | None
    seconds: float


@dataclass
class Taken:
    """The groups of one step.

    overtaken: for each, the groups drawn later that were trained before.
    """

    ready: list[Ready]
    overtaken: list[int]


class GroupQueue:
    """size: groups of a step.
    bound: steps that the oldest token of a trained group may be old.
    ahead: groups drawn beyond the step that is made now.
    window: later groups that may overtake one.
    """

    def __init__(self, size: int, bound: int, ahead: int, window: int, position: int = 0):
        self.size, self.bound, self.ahead, self.window = size, bound, ahead, window
        self.position = position
        self.number = 0
        self.again: list[Draw] = []
        self.under_way: dict[int, Draw] = {}
        self.ready: dict[int, Ready] = {}
        self.counts: Counter[str] = Counter()
        """Since the start: groups trained, and those drawn again by reason."""
        self._overtaken: Counter[int] = Counter()
        self._trained_s: list[float] = [0.0, 0.0]
        self._left_s: list[float] = [0.0, 0.0]
        """Seconds and number of the groups that were trained, and of all that left."""

    @property
    def outstanding(self) -> int:
        """Groups that are drawn and neither trained nor given up."""
        return len(self.under_way) + len(self.ready)

    def full(self, waiting: bool) -> bool:
        """No further group may be drawn now.

        waiting: the trainer waits for groups, and makes no step.
        """
        return self.outstanding >= self.ahead + (self.size if waiting else 0)

    def draw(self) -> Draw:
        """The next group to roll out: one that has to be drawn again, or the next position."""
        if self.again:
            draw = self.again.pop(0)
        else:
            draw = Draw(-1, self.position)
            self.position += 1
        if draw.number < 0:
            draw = replace(draw, number=self.number)
            self.number += 1
        self.under_way[draw.number] = draw
        return draw

    def finish(self, ready: Ready) -> None:
        """A group under way is ready to be trained."""
        del self.under_way[ready.draw.number]
        self.ready[ready.draw.number] = ready

    def give_up(self, draw: Draw, reason: str, seconds: float) -> None:
        """A group, under way or ready, is not trained: its scenario is drawn again."""
        self.under_way.pop(draw.number, None)
        self.ready.pop(draw.number, None)
        self._overtaken.pop(draw.number, None)
        self.counts[reason] += 1
        _add(self._left_s, seconds)
        self.again.append(Draw(-1, draw.position, draw.attempt + 1))

    def drop_stale(self, step: int) -> None:
        """Give up the ready groups that `step`, the newest one, can't be trained on any more."""
        for ready in list(self.ready.values()):
            if ready.oldest is not None and ready.oldest < step - self.bound:
                self.give_up(ready.draw, "stale", ready.seconds)

    def take(self, step: int) -> Taken | None:
        """The groups to train `step` on, in the order of their draws; None while they are not ready.

        Every token in them is at most `bound` steps old.
        """
        self.drop_stale(step)
        waits = min(self.under_way, default=None)
        ready = sorted(number for number in self.ready if waits is None or number <= waits + self.window)
        if len(ready) < self.size:
            return None
        chosen = ready[: self.size]
        taken = Taken([self.ready.pop(number) for number in chosen], [self._overtaken.pop(n, 0) for n in chosen])
        for left in (*self.under_way, *self.ready):
            self._overtaken[left] += sum(number > left for number in chosen)
        for group in taken.ready:
            _add(self._trained_s, group.seconds)
            _add(self._left_s, group.seconds)
        self.counts["trained"] += self.size
        return taken

    @property
    def duration_bias(self) -> float:
        """Mean seconds of the groups that were trained, over those of all that left the queue; 1
        before any did. Below 1: slow groups were given up more often.
        """
        (trained_s, trained), (left_s, left) = self._trained_s, self._left_s
        return trained_s / trained / (left_s / left) if trained and left_s else 1.0


def _add(total: list[float], seconds: float) -> None:
    total[0] += seconds
    total[1] += 1
