"""Trajectories that can't be trained on: one is left out by name, many are refused, and so is whatever only a bug explains."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from lockstep.batching.prepare import Prepared, prepare
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError, DataError, StaleRolloutError
from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup
from random_batches import choice, trajectory


def groups(count: int = 8, size: int = 8) -> list[TrajectoryGroup]:
    return [
        TrajectoryGroup(
            trajectories=[
                trajectory(choice([1, 2, 3 + number], [4 + k, 5, 6], version="m@3"), reward=float(k % 3))
                for k in range(size)
            ]
        )
        for number in range(count)
    ]


def ready(batch: list[TrajectoryGroup], **settings: Any) -> Prepared:
    return prepare(batch, model_name="m", step=3, config=TrainConfig(**settings))


def nan_reward() -> Trajectory:
    unusable = trajectory(choice([1, 2, 10], [4]))
    object.__setattr__(unusable, "reward", float("nan"))
    return unusable


def nan_metric() -> Trajectory:
    unusable = trajectory(choice([1, 2, 10], [4], version="m@3"))
    unusable.metrics["speed"] = float("nan")
    return unusable


UNUSABLE = {
    "nothing_sampled": lambda: Trajectory(messages_and_choices=[{"role": "user", "content": "?"}], reward=0),
    "sampling": lambda: trajectory(
        choice([1, 2, 10], [4], sampling={"temperature": 1.0, "response_format": {"type": "json_object"}})
    ),
    "stale": lambda: trajectory(choice([1, 2, 10], [4], version="m@2")),
    "too_long": lambda: trajectory(choice([1, 2, 10], [4] * 400, logprobs=[-0.5] * 400, version="m@3")),
    "reward": nan_reward,
    "metric": nan_metric,
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_b2_one_unusable_trajectory_is_left_out_by_name(kind, caplog):
    """One of 64: the batch is the one that the other 63 make, whose group takes its baseline from seven."""
    batch = groups()
    batch[7].trajectories[2] = UNUSABLE[kind]()
    with caplog.at_level(logging.WARNING):
        prepared = ready(batch, row_length=256)
    (warning,) = caplog.messages
    assert "group 7, trajectory 2" in warning
    assert prepared.metrics["trajectories_dropped"] == 1
    assert prepared.metrics[f"trajectories_dropped_{kind}"] == 1
    assert prepared.metrics["trajectories"] == 63
    del batch[7].trajectories[2]
    expected = ready(batch, row_length=256)
    assert expected.metrics["trajectories_dropped"] == 0
    np.testing.assert_array_equal(prepared.batch.tokens_RS, expected.batch.tokens_RS)
    np.testing.assert_array_equal(prepared.batch.sequence_advantage_Q, expected.batch.sequence_advantage_Q)
    assert prepared.metrics["reward"] == expected.metrics["reward"]


def test_b2_more_unusable_trajectories_than_tolerated_are_refused():
    batch = groups()
    for group in batch[:7]:
        group.trajectories[0] = UNUSABLE["stale"]()
    assert ready(batch).metrics["trajectories_dropped_stale"] == 7  # a tenth of 64, rounded up
    batch[7].trajectories[0] = UNUSABLE["nothing_sampled"]()
    with pytest.raises(
        StaleRolloutError, match=r"^8 of 64 .*, 7 tolerated \(max_dropped\); first: group 0, trajectory 0 "
    ):
        ready(batch)
    assert ready(batch, max_dropped=8).metrics["trajectories_dropped_stale"] == 7
    with pytest.raises(DataError, match="1 of 64 trajectories"):
        ready([*groups(7), batch[7]], max_dropped=0)
    with pytest.raises(ConfigError, match="max_dropped"):
        TrainConfig(max_dropped=1.5)


def test_b2_a_group_that_is_left_with_one_trajectory_is_skipped():
    batch = groups(count=8, size=2)
    batch[1].trajectories[0] = UNUSABLE["nothing_sampled"]()
    prepared = ready(batch)
    assert prepared.metrics["groups_skipped"] == 1
    assert not any(name.startswith("group 1,") for name in prepared.batch.sequence_ids)
    with pytest.raises(DataError, match=r"batch is empty.*; first: group 0, trajectory 0 has no choice"):
        ready([batch[1]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_versions": [{"version": "judge@3", "start": 0, "end": 3}]}, "sampled by 'judge@3', not by a version"),
        (
            {"weight_versions": [{"version": "m@9", "start": 0, "end": 3}]},
            "sampled by step 9, but the model is at step 3",
        ),
        ({"weight_versions": []}, "carries no weight version"),
        ({"token_ids": None}, "no token_ids"),
        ({"sampled_logprobs": None}, "has no logprobs"),
        ({"sampling": None}, "does not say how it was sampled"),
    ],
)
def test_b2_what_only_a_bug_explains_is_refused(changed, message):
    batch = groups()
    good = choice([1, 2, 10], [4, 5, 6], version="m@3")
    batch[7].trajectories[2] = trajectory(type(good).model_validate(good.model_dump() | changed))
    with pytest.raises(DataError, match=message):
        ready(batch, max_dropped=64)
