"""Rollouts at once: additive increase, multiplicative decrease, within the user's limits."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.loop.pipeline.concurrency import CUT, Concurrency
from lockstep.loop.places import Places


@pytest.mark.parametrize("room", [24, 100, 400])
def test_it_settles_where_the_cache_has_room(room):
    """A cache of `room` rollouts: after a while nothing is preempted twice in a row, and most of the room is used."""
    concurrency, preemptions, used = Concurrency(least=1, most=512, step=8), 0.0, []
    for _ in range(200):
        wanted = concurrency.now
        preemptions += max(0, wanted - room)
        used.append(min(wanted, room))
        concurrency.update(min(1.0, wanted / room), preemptions, busy=True)
    assert min(used[100:]) >= CUT * 0.8 * room - 8
    assert max(used[100:]) <= room


@settings(max_examples=50, deadline=None)
@given(
    least=st.integers(1, 40),
    more=st.integers(0, 200),
    readings=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 5), st.booleans()), max_size=40),
)
def test_it_stays_within_the_limits(least, more, readings):
    concurrency, preemptions = Concurrency(least, least + more, step=8), 3.0
    for kv_use, preempted, busy in readings:
        before, preemptions = concurrency.now, preemptions + preempted
        after = concurrency.update(kv_use, preemptions, busy)
        assert least <= after <= least + more
        assert busy or after <= before


def test_what_was_preempted_before_the_first_look_does_not_count():
    concurrency = Concurrency(least=1, most=64, step=8)
    assert concurrency.update(0.1, 1000.0, busy=True) == 40
    assert concurrency.update(0.1, 1001.0, busy=True) == 30


async def test_places_follow_their_number_and_a_cancelled_wait_keeps_none():
    places, running, most = Places(2), [0], [0]

    async def rollout():
        async with places:
            running[0] += 1
            most[0] = max(most[0], running[0])
            try:
                await asyncio.sleep(0)
            finally:
                running[0] -= 1

    tasks = [asyncio.create_task(rollout()) for _ in range(9)]
    await asyncio.sleep(0)
    for task in tasks[1::3]:
        task.cancel()
    places.resize(3)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most[0] == 3
    assert places.used == 0
    places.resize(1)
    async with asyncio.timeout(5), places:
        assert places.used == 1
