"""Advantages: exact zeros for equal rewards, no noise blown up, and the textbook values otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.batching.advantages import group_advantages
from lockstep.errors import DataError

rewards = st.floats(-1e30, 1e30)


@given(reward=rewards, size=st.integers(2, 9), normalization=st.sampled_from(["std", "none"]))
def test_equal_rewards_give_exactly_zero(reward, size, normalization):
    assert group_advantages([reward] * size, normalization).tolist() == [0.0] * size


@given(terms=st.lists(st.floats(-5, 5), min_size=3, max_size=6), order=st.permutations(range(3)))
def test_rewards_summed_in_another_order_are_equal(terms, order):
    """0.1 + 0.2 is not 0.3: a residue of 1e-17 must not become an advantage of 1."""
    one, other = sum(terms), sum([terms[i] for i in order] + terms[3:])
    if abs(one) > 1e-3:
        assert group_advantages([one, other, one]).tolist() == [0.0] * 3


@given(st.lists(rewards, min_size=2, max_size=12), st.sampled_from(["std", "none"]))
def test_always_finite_and_centred(values, normalization):
    advantages = group_advantages(values, normalization)
    assert np.isfinite(advantages).all()
    scale = np.abs(advantages).max() or 1.0
    assert abs(advantages.sum()) <= 1e-9 * scale * len(values)


def test_closed_form():
    assert group_advantages([0.0, 1.0, 0.5, 0.5], "none").tolist() == pytest.approx([-0.5, 0.5, 0, 0])
    assert group_advantages([0.0, 2.0], "std").tolist() == pytest.approx([-1, 1])
    values = np.array([0.1, 0.4, 1.0])
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(group_advantages(values.tolist(), "std"), expected)
    np.testing.assert_allclose(group_advantages((values * 1e-300).tolist(), "std"), expected)


def test_a_quiet_group_stays_quiet_beside_a_live_one():
    quiet = group_advantages([0.1 + 0.2, 0.3, 0.3])
    live = group_advantages([0.0, 1.0, 0.0])
    assert quiet.tolist() == [0.0] * 3
    assert np.abs(live).max() < 2


def test_bad_groups_are_named():
    with pytest.raises(DataError, match="group 3 has 1 trajectory"):
        group_advantages([1.0], name="group 3")
    for bad in (float("nan"), float("inf"), 1e31):
        with pytest.raises(DataError, match="group 3, trajectory 1: reward"):
            group_advantages([0.0, bad], name="group 3")
