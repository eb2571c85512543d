"""Mismatch metrics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lockstep.errors import DataError
from lockstep.metrics.mismatch import expert_choices_that_differ, logprob_mismatch, top_kl, top_overlap


def test_logprobs_closed_form():
    mismatch = logprob_mismatch(np.array([-1.0, -2.0, -3.0]), np.array([-1.5, -2.0, -2.0]))
    assert mismatch.tokens == 3
    assert mismatch.mean_abs == pytest.approx(0.5)
    assert mismatch.mean_abs_pct == pytest.approx(25.0)
    assert mismatch.mean == pytest.approx(0.5 / 3)
    assert mismatch.largest == 1.0
    assert mismatch.p50 == pytest.approx(0.5)
    assert mismatch.kl == pytest.approx((math.exp(-0.5) + 0.5 - 1 + math.e - 1 - 1) / 3)
    assert set(mismatch.as_metrics()) >= {"mean_abs", "mean_abs_pct", "kl", "p99"}
    same = logprob_mismatch(np.array([-1.0]), np.array([-1.0]))
    assert (same.mean_abs, same.kl) == (0.0, 0.0)
    assert logprob_mismatch(np.zeros(2), np.zeros(2)).mean_abs_pct == 0.0


def test_k3_is_the_kl_on_average():
    random = np.random.default_rng(0)
    p, q = (np.log(random.dirichlet(np.ones(6))) for _ in range(2))
    sampled = random.choice(6, size=400_000, p=np.exp(p))
    exact = float((np.exp(p) * (p - q)).sum())
    assert logprob_mismatch(p[sampled], q[sampled]).kl == pytest.approx(exact, rel=0.03)


def test_top_overlap_and_expert_choices():
    reference = np.array([[1, 2, 3], [4, 5, 6]])
    other = np.array([[1, 3, 9], [5, 4, 6]])
    assert top_overlap(reference, other, 1) == 0.5
    assert top_overlap(reference, other, 3) == pytest.approx(5 / 6)
    routed_experts = np.array([[[0, 1], [2, 3]]])
    assert expert_choices_that_differ(routed_experts, routed_experts[..., ::-1]) == 0.0
    assert expert_choices_that_differ(routed_experts, np.array([[[0, 2], [2, 3]]])) == 0.25


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DataError, match="can't compare"):
        logprob_mismatch(np.zeros(2), np.zeros(3))
    with pytest.raises(DataError, match="not finite"):
        logprob_mismatch(np.array([np.nan]), np.zeros(1))
    with pytest.raises(DataError, match="top 3"):
        top_overlap(np.zeros((1, 2)), np.zeros((1, 3)), 3)
    with pytest.raises(DataError, match="routed experts of shape"):
        expert_choices_that_differ(np.zeros((1, 1, 2)), np.zeros((1, 2, 2)))


def test_the_kl_of_the_top_is_a_lower_bound_that_is_zero_for_equal_policies():
    rng = np.random.default_rng()
    first_TV, second_TV = (rng.normal(size=(40, 300)) * 2 for _ in range(2))
    second_TV = first_TV + 0.05 * second_TV
    first_TV, second_TV = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (first_TV, second_TV))
    exact_T = (np.exp(first_TV) * (first_TV - second_TV)).sum(1)
    first, second = ([{int(v): row[v] for v in np.argsort(-row)[:20]} for row in z] for z in (first_TV, second_TV))
    measured_T = top_kl(first, second)
    assert (measured_T >= 0).all()
    assert (measured_T <= exact_T + 1e-12).all()
    assert measured_T.mean() > 0.2 * exact_T.mean()
    assert np.abs(top_kl(first, first)).max() < 1e-12
    with pytest.raises(DataError, match="can't compare"):
        top_kl(first, second[:-1])
