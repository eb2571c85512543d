"""Which replica answers: balanced, steady, and never one that broke off."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict

import pytest
from test_slots import Queueing, ask

import lockstep as ls
from lockstep.backends.base import Endpoint
from lockstep.model import open_client
from lockstep.rollouts.leases import current_scope, rollout_scope
from lockstep.rollouts.router import Replica, Router


def replicas(count: int) -> list[Replica]:
    return [Replica(number, f"http://127.0.0.1:{9000 + number}/v1", "key") for number in range(count)]


async def placed(router: Router, groups: int, size: int, requests: int = 1) -> dict[int, set[int]]:
    """The replicas that answer each group's rollouts, which all run at once."""
    seen, everybody = defaultdict(set), asyncio.Barrier(groups * size)

    async def rollout(group: int) -> ls.Trajectory:
        for _ in range(requests):
            seen[group].add(router.hold({}).replica().number)
            await everybody.wait()
        return ls.Trajectory(messages_and_choices=[], reward=0.0)

    tries = [[rollout(group) for _ in range(size)] for group in range(groups)]
    await ls.gather_trajectory_groups(tries, progress=False)
    return seen


@pytest.mark.parametrize(("count", "groups", "size"), [(2, 8, 4), (3, 9, 16), (5, 40, 8)])
async def test_a_group_stays_together_and_no_replica_has_more_than_its_share(count, groups, size):
    everyone = replicas(count)
    seen = await placed(Router(lambda: everyone), groups, size, requests=3)
    assert all(len(numbers) == 1 for numbers in seen.values())
    per_replica = Counter(number for numbers in seen.values() for number in numbers)
    assert max(per_replica.values()) <= -(-groups // count) + 1
    assert len(per_replica) == count


async def test_the_end_of_a_replica_moves_its_groups_alone():
    everyone = replicas(3)
    serving = list(everyone)
    router = Router(lambda: serving)
    holds = []
    with rollout_scope():
        scope = current_scope()
        for _ in range(30):
            holds.append(router.hold_of_episode(None))
        assert scope is not None
    before = [hold.replica().number for hold in holds]
    assert set(Counter(before).values()) <= set(range(8, 13))
    del serving[1]
    after = [hold.replica().number for hold in holds]
    assert all(now == then for now, then in zip(after, before, strict=True) if then != 1)
    assert 1 not in after
    assert set(Counter(after).values()) <= set(range(13, 18))
    serving.append(Replica(1, "http://127.0.0.1:9999/v1", "new"))
    assert [hold.replica().number for hold in holds] == after  # who has a place keeps it
    assert router.hold_of_episode(None).replica().number == 1  # and the empty one fills


async def test_what_has_ended_weighs_nothing():
    everyone = replicas(2)
    router = Router(lambda: everyone)
    for _ in range(50):
        hold = router.hold({"prompt": str(random.random())})
        assert hold.replica() in everyone
        hold.end()
        hold.end()
    assert not router._families


async def test_a_replica_that_broke_off_rests(monkeypatch):
    everyone = replicas(2)
    router = Router(lambda: everyone)
    hold = router.hold_of_episode(None)
    first = hold.replica()
    assert router.broke_off(first.base_url)
    assert hold.replica() != first
    router.broke_off(hold.replica().base_url)
    assert hold.replica() in everyone  # all rest: any is better than none
    assert not Router(lambda: everyone[:1]).broke_off(everyone[0].base_url)


async def test_requests_find_another_replica_when_theirs_ends():
    """Two servers with keys of their own. One ends amid 32 rollouts: each gets its reply from the other, and no more is asked of
    a server than it takes.
    """
    async with Queueing(4, 0.05) as ends, Queueing(4, 0.05) as stays:
        serving = [Replica(0, ends.base_url, "a"), Replica(1, stays.base_url, "b")]
        endpoint = Endpoint(ends.base_url, "a", 4, 512, replicas=tuple(serving))
        async with open_client(endpoint, servers=Router(lambda: serving)) as client:

            async def rollout(number: int) -> ls.Trajectory:
                for turn in range(4):
                    if (number, turn) == (0, 2):
                        ends.die()
                    await ask(client, f"{number // 4} {turn}", max_tokens=1)
                return ls.Trajectory(messages_and_choices=[], reward=0.0)

            tries = [[rollout(4 * group + number) for number in range(4)] for group in range(8)]
            groups = await ls.gather_trajectory_groups(tries, progress=False)
            await client.post("/tokenize", body={"prompt": "x"}, cast_to=object)  # of no rollout, and samples nothing
        assert sum(len(group.trajectories) for group in groups) == 32
        assert ends.requests > 0
        assert ends.most <= 4
        assert stays.most <= 4
        assert ends.requests + stays.requests >= 32 * 4
