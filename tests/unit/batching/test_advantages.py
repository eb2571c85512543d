"""Advantages: exact zeros for equal rewards, no noise blown up, and each estimator's formula otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.algorithms.advantages import find_advantage, named_advantages
from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards
from lockstep.batching.advantages import advantages
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError, DataError

rewards = st.floats(-1e30, 1e30)
GROUP_BASELINE = sorted(name for name, estimator in named_advantages().items() if estimator.baseline == "group")


def estimated(groups: list[list[float]], name: str = "grpo") -> list[float]:
    return advantages(groups, find_advantage(name)).tolist()


@given(reward=st.floats(0, 1e30), size=st.integers(2, 9), name=st.sampled_from(sorted(named_advantages())))
def test_equal_rewards_give_exactly_zero(reward, size, name):
    assert estimated([[reward] * size], name) == [0.0] * size


@given(terms=st.lists(st.floats(-5, 5), min_size=3, max_size=6), order=st.permutations(range(3)))
def test_rewards_summed_in_another_order_are_equal(terms, order):
    """0.1 + 0.2 is not 0.3: a residue of 1e-17 must not become an advantage of 1."""
    straight, other = sum(terms), sum([terms[i] for i in order] + terms[3:])
    if abs(straight) > 1e-3:
        assert estimated([[straight, other, straight]]) == [0.0] * 3


@given(st.lists(rewards, min_size=2, max_size=12), st.sampled_from(["grpo", "dr_grpo", "rloo", "reinforce_pp"]))
def test_always_finite_and_centred(values, name):
    advantages = np.array(estimated([values], name))
    assert np.isfinite(advantages).all()
    assert abs(advantages.sum()) <= 1e-9 * (np.abs(advantages).max() or 1.0) * len(values)


FIRST, SECOND = np.array([0.0, 1.0, 0.5, 0.5]), np.array([1.0, 3.0])
BOTH = np.concatenate([FIRST, SECOND])
CENTRED = np.concatenate([FIRST - 0.5, SECOND - 2.0])
FORMULAS = {
    "grpo": np.concatenate([(FIRST - 0.5) / FIRST.std(), [-1.0, 1.0]]),
    "dr_grpo": CENTRED,
    "rloo": np.array([0 - 2 / 3, 1 - 1 / 3, 0.5 - 0.5, 0.5 - 0.5, 1 - 3, 3 - 1]),
    "batch_std": CENTRED / BOTH.std(),
    "reinforce_pp": (BOTH - BOTH.mean()) / BOTH.std(),
    "reinforce_pp_baseline": CENTRED / CENTRED.std(),
    "maxrl": np.concatenate([(FIRST - 0.5) / 0.5, (SECOND - 2.0) / 2.0]),
}


@pytest.mark.parametrize("name", sorted(named_advantages()))
def test_closed_form(name):
    """Two groups of different size, by hand; and the same at another scale."""
    groups = [FIRST.tolist(), SECOND.tolist()]
    np.testing.assert_allclose(estimated(groups, name), FORMULAS[name], rtol=1e-12, atol=1e-15)
    scaled = [(np.array(rewards) * 1e-200).tolist() for rewards in groups]
    factor = 1.0 if find_advantage(name).scale_free else 1e-200
    np.testing.assert_allclose(estimated(scaled, name), FORMULAS[name] * factor, rtol=1e-12, atol=1e-15 * factor)


def test_maxrl_is_the_gradient_of_the_log_success_rate():
    """n rewards of which k are 1: the mean of A d log p over samples is d log(success rate) for a Bernoulli policy."""
    successes, size = 2, 8
    advantages = estimated([[1.0] * successes + [0.0] * (size - successes)], "maxrl")
    rate = successes / size
    slope = [1.0 - rate] * successes + [-rate] * (size - successes)  # d log p(sample) / d logit
    assert np.mean(np.array(advantages) * slope) == pytest.approx((1 - rate), rel=1e-12)  # d log(rate) / d logit


@pytest.mark.parametrize("name", GROUP_BASELINE)
def test_a_quiet_group_stays_quiet_beside_a_live_one(name):
    advantages = estimated([[0.1 + 0.2, 0.3, 0.3], [0.0, 1.0, 0.0]], name)
    assert advantages[:3] == [0.0] * 3
    assert 0 < max(map(abs, advantages[3:])) < 5


def test_without_a_group_baseline_equal_groups_teach_against_each_other():
    assert estimated([[1.0, 1.0], [0.0]], "reinforce_pp") == pytest.approx([0.5**0.5, 0.5**0.5, -(2**0.5)])


def test_bad_groups_are_named():
    estimator = find_advantage("grpo")
    with pytest.raises(DataError, match="group 3 has 1 trajectory"):
        advantages([[1.0]], estimator, ["group 3"])
    for bad in (float("nan"), float("inf"), 1e31):
        with pytest.raises(DataError, match="group 3, trajectory 1: reward"):
            advantages([[0.0, bad]], estimator, ["group 3"])
    with pytest.raises(
        DataError, match=r"group 0, trajectory 1: reward -1\.0 is below 0, the least that advantage = maxrl"
    ):
        estimated([[1.0, -1.0]], "maxrl")


def ranks(rewards: Rewards) -> np.ndarray:
    """A user's: the rank within the group, from -1 to 1."""
    return rewards.reward_T.argsort().argsort() * 2.0 / (len(rewards.reward_T) - 1) - 1


def too_few(rewards: Rewards) -> np.ndarray:
    return rewards.reward_T[:1]


RANKS = PolicyAdvantage("ranks", ranks, scale_free=True)


def test_a_users_estimator():
    config = TrainConfig(advantage="test_advantages:RANKS")
    assert advantages([[5.0, 7.0, 6.0]], config.policy_advantage).tolist() == [-1.0, 1.0, 0.0]
    grown = TrainConfig(advantage="test_advantages:ranks").policy_advantage
    assert advantages([[5.0, 7.0, 6.0]], grown).tolist() == [-7.0, 7.0, 0.0]
    with pytest.raises(DataError, match="advantage = test_advantages:too_few gave"):
        advantages([[5.0, 7.0]], TrainConfig(advantage="test_advantages:too_few").policy_advantage)
    with pytest.raises(ConfigError, match="advantage = 'nothing': must be one of batch_std, dr_grpo, grpo, maxrl"):
        TrainConfig(advantage="nothing")
    with pytest.raises(ConfigError, match="here it is advantage"):
        TrainConfig(advantage_normalization="none")  # pyright: ignore[reportCallIssue]
