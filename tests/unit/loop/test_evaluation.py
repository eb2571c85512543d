"""What an evaluation's figures say: pass@k without bias, intervals that hold, and rollouts that are limited."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest

import lockstep as ls
from lockstep.errors import ConfigError
from lockstep.loop.evaluation import evaluate, greedy_metrics, pass_at, sample, sampled_metrics
from lockstep.loop.run_file import TaskSection
from lockstep.loop.task import Task
from lockstep.rollouts.trajectory import TrajectoryGroup


def rewarded(*rewards: float) -> TrajectoryGroup:
    return TrajectoryGroup(trajectories=[ls.Trajectory(messages_and_choices=[], reward=reward) for reward in rewards])


@pytest.mark.parametrize(("tries", "right", "k"), [(6, 2, 1), (6, 2, 3), (5, 0, 2), (5, 5, 4), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_the_subsets_with_a_right_try(tries, right, k):
    subsets = list(itertools.combinations([True] * right + [False] * (tries - right), k))
    assert pass_at(k, tries, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_sampled_figures():
    """Two scenarios, four tries each; a third whose tries failed does not count."""
    metrics = sampled_metrics([rewarded(1, 0, 0, 0), rewarded(1, 1, 0.5, 0), rewarded()], pass_reward=1.0)
    assert metrics["sampled_reward"] == pytest.approx((0.25 + 0.625) / 2)
    assert metrics["pass_at_1"] == pytest.approx((0.25 + 0.5) / 2)
    assert metrics["pass_at_2"] == pytest.approx((3 / 6 + 5 / 6) / 2)
    assert metrics["pass_at_4"] == 1.0
    assert "pass_at_8" not in metrics
    assert sampled_metrics([rewarded(0.5, 0.5)], pass_reward=0.5)["pass_at_1"] == 1.0


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Fresh scenarios of known mean 0.3: about 95 of 100 intervals of 40 hold it (binomial: 87 of 100 in 1 of 1,500)."""
    draws = random.Random()
    covered = 0
    for _ in range(100):
        interval = greedy_metrics([rewarded(float(draws.random() < 0.3)) for _ in range(40)])
        covered += interval["greedy_reward_low"] <= 0.3 <= interval["greedy_reward_high"]
        assert interval["greedy_reward_low"] <= interval["greedy_reward"] <= interval["greedy_reward_high"]
    assert covered >= 85


async def test_an_evaluation_has_its_own_limit_and_asks_held_out_scenarios():
    running, most, asked = [0], [0], []

    async def rollout(model, scenario, temperature):
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.001)
        running[0] -= 1
        asked.append((scenario, temperature))
        return ls.Trajectory(messages_and_choices=[], reward=1.0)

    task = Task(Path(), [1, 2, 3], rollout, None, [10, 20])
    settings = {"file": "", "steps": 1, "evaluate_samples": 3, "evaluate_concurrent": 2, "temperature": 0.7}
    section = TaskSection(**settings)
    groups = await sample(None, task, section, lambda group, trajectory: None)  # pyright: ignore[reportArgumentType]
    assert [len(group.trajectories) for group in groups] == [3, 3]
    assert most[0] == 2
    assert sorted(asked) == [(10, 0.7)] * 3 + [(20, 0.7)] * 3
    await evaluate(None, task, section)  # pyright: ignore[reportArgumentType]
    assert sorted(asked[6:]) == [(10, 0.0), (20, 0.0)]


def test_a_pass_reward_without_samples_is_refused():
    with pytest.raises(ConfigError, match="pass_reward has no effect without evaluate_samples"):
        TaskSection(file="task.py", steps=1, pass_reward=0.5)
