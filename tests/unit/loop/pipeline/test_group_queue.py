"""The bookkeeping of the asynchronous loop, without a server: order, staleness, and each group once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.config.pipeline import PipelineConfig
from lockstep.errors import ConfigError
from lockstep.loop.pipeline.group_queue import GroupQueue, Ready
from lockstep.rollouts.trajectory import TrajectoryGroup

GROUP = TrajectoryGroup(trajectories=[])


class Simulated:
    """A trainer and rollouts in a random order of events; each group lasts for a random number of them."""

    def __init__(self, queue: GroupQueue, seed: int, steps: int):
        self.queue, self.random, self.steps = queue, random.Random(seed), steps
        self.step, self.training, self.events = 0, False, 0
        self.trained: Counter[int] = Counter()
        self.ages: list[int] = []
        self.began: dict[int, tuple[int, int]] = {}

    def run(self, fail: float = 0.0) -> None:
        while self.step < self.steps:
            self.events += 1
            assert self.events < 100_000, "the queue stands still"
            self.start()
            act = self.random.choice(("end", "end", "train"))
            if act == "end":
                self.end(fail)
            elif self.training:
                self.training, self.step = False, self.step + 1
            else:
                self.take()

    def start(self) -> None:
        while not self.queue.full(waiting=not self.training):
            draw = self.queue.draw()
            slow = 40 if self.random.random() < 0.2 else 4
            self.began[draw.number] = (self.step, self.events + self.random.randrange(slow))

    def end(self, fail: float) -> None:
        ended = [n for n in self.queue.under_way if self.began[n][1] <= self.events]
        if not ended:
            return
        draw = self.queue.under_way[self.random.choice(ended)]
        if self.random.random() < fail:
            self.queue.give_up(draw, "failed", 1.0)
        else:
            self.queue.finish(Ready(draw, GROUP, self.began[draw.number][0], 1.0))

    def take(self) -> None:
        taken = self.queue.take(self.step)
        if taken is None:
            return
        self.training = True
        assert len(taken.ready) == self.queue.size
        numbers = [ready.draw.number for ready in taken.ready]
        assert numbers == sorted(numbers)
        assert max(taken.overtaken) <= self.queue.window
        for ready in taken.ready:
            self.trained[ready.draw.position] += 1
            assert ready.oldest is not None
            self.ages.append(self.step - ready.oldest)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 5),
    bound=st.integers(0, 4),
    ahead=st.integers(0, 20),
    window=st.integers(0, 20),
    fail=st.sampled_from([0.0, 0.2]),
)
def test_no_trained_token_is_older_than_the_bound_and_each_group_is_trained_once(
    seed, size, bound, ahead, window, fail
):
    """Whatever the limits: groups that become too old are dropped, and their positions trained later."""
    queue = GroupQueue(size, bound, min(ahead, bound * size), window)
    simulated = Simulated(queue, seed, steps=12)
    simulated.run(fail)
    assert max(simulated.ages) <= bound
    assert set(simulated.trained.values()) == {1}
    assert queue.counts["trained"] == 12 * size == simulated.trained.total()
    missing = set(range(queue.position)) - set(simulated.trained)
    left = [draw.position for draw in (*queue.under_way.values(), *queue.again)]
    left += [ready.draw.position for ready in queue.ready.values()]
    assert sorted(left) == sorted(missing)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 5),
    bound=st.integers(0, 4),
    given_window=st.none() | st.integers(0, 9),
)
def test_with_the_default_limits_no_group_becomes_too_old(seed, size, bound, given_window):
    window = None if given_window is None else min(given_window, bound * size)
    queue = GroupQueue(size, bound, *PipelineConfig(window=window).limits(bound, size))
    simulated = Simulated(queue, seed, steps=20)
    simulated.run()
    assert queue.counts["stale"] == 0
    assert queue.duration_bias == 1.0
    if bound == 0:
        assert set(simulated.ages) == {0}


@pytest.mark.parametrize("size", [1, 8])
def test_a_queue_of_one_works(size):
    queue = GroupQueue(size, 1, *PipelineConfig(queue_groups=1).limits(1, size))
    simulated = Simulated(queue, seed=3, steps=20)
    simulated.run()
    assert queue.counts["trained"] == 20 * size
    assert queue.counts["stale"] == 0


def test_a_queue_in_which_everything_becomes_too_old_is_refused():
    with pytest.raises(ConfigError, match=r"queue_groups = 9.*at most 8"):
        PipelineConfig(queue_groups=9).limits(1, 8)
    with pytest.raises(ConfigError, match=r"queue_groups = 1.*at most 0"):
        PipelineConfig(queue_groups=1).limits(0, 8)


def test_slow_groups_that_are_dropped_show_in_the_bias():
    """Two groups of 1 s are trained, one of 4 s is dropped: 1 s over 2 s."""
    queue = GroupQueue(2, 0, 0, 5)
    draws = [queue.draw() for _ in range(3)]
    for draw, oldest, seconds in zip(draws, (1, 0, 1), (1.0, 4.0, 1.0), strict=True):
        queue.finish(Ready(draw, GROUP, oldest, seconds))
    taken = queue.take(1)
    assert taken is not None
    assert [ready.draw.number for ready in taken.ready] == [0, 2]
    assert queue.counts == {"stale": 1, "trained": 2}
    assert queue.duration_bias == pytest.approx(0.5)
    again = queue.draw()
    assert (again.position, again.attempt, again.number) == (1, 1, 3)


def test_a_slow_group_is_overtaken_by_the_window_and_then_waited_for():
    queue = GroupQueue(1, 9, 9, 2)
    draws = [queue.draw() for _ in range(5)]
    for draw in draws[1:]:
        queue.finish(Ready(draw, GROUP, 0, 1.0))
    assert [queue.take(0).ready[0].draw.number for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
    assert queue.take(0) is None
    queue.finish(Ready(draws[0], GROUP, 0, 1.0))
    taken = queue.take(0)
    assert taken is not None
    assert (taken.ready[0].draw.number, taken.overtaken) == (0, [2])
