"""Each illness, planted in a run that learns, raises its own advice and no other's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lockstep.cli.report.advice import advice
from runs import healthy_metrics

Values = dict[str, float]
STEPS = 24


def _flat(step: Values) -> None:
    step["reward"] = 0.3


def _collapsed(step: Values, done: float) -> None:
    _flat(step)
    step["entropy"] *= (1 - done) ** 2


def _longer(step: Values, done: float) -> None:
    _flat(step)
    step["reply_tokens_mean"] *= 1 + 4 * done


PLANTED: dict[str, Callable[[Values, float], object]] = {
    "rewards-equal": lambda step, done: step.update(reward=0.0, reward_std=0.0, groups_without_signal=8.0),
    "zero-variance": lambda step, done: step.update(groups_without_signal=6.0),
    "truncated": lambda step, done: step.update(replies_truncated=0.97, groups_without_signal=6.0),
    "entropy-collapse": _collapsed,
    "length-growth": _longer,
    "mismatch": lambda step, done: step.update(mismatch=step["mismatch"] * (1 + 6 * done)),
    "idle-trainer": lambda step, done: step.update(seconds_rollout=20.0),
    "stale-queue": lambda step, done: step.update(trajectories_dropped_stale=30.0),
}


def test_rollouts_beside_the_training_are_no_wait():
    """The asynchronous loop: only what the trainer waited counts."""
    metrics = healthy_metrics(STEPS, np.random.default_rng())
    for waited, given in ((0.1, []), (20.0, ["idle-trainer"])):
        for values in metrics.values():
            values.update(seconds_rollout=20.0, wait_for_rollouts=waited)
        assert [each.illness for each in advice(metrics)] == given


@pytest.mark.parametrize("illness", PLANTED)
def test_an_illness_raises_its_advice_and_no_other(illness):
    random = np.random.default_rng()
    metrics = healthy_metrics(STEPS, random)
    assert advice(metrics) == []
    for step, values in metrics.items():
        PLANTED[illness](values, step / STEPS)
    (given,) = advice(metrics)
    assert given.illness == illness
    assert given.says
    assert given.remedy


def test_nothing_is_said_before_there_is_a_trend():
    random = np.random.default_rng()
    metrics = healthy_metrics(3, random)
    for values in metrics.values():
        values.update(reward=0.0, reward_std=0.0)
    assert advice(metrics) == []
    assert advice({}) == []


def test_a_run_in_fp32_whose_rounding_grows_is_well():
    """A third of a million: three times nothing is nothing."""
    metrics = healthy_metrics(STEPS, np.random.default_rng())
    for step, values in metrics.items():
        values["mismatch"] = 3e-7 * step
    assert advice(metrics) == []
