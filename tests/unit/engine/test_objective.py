"""GMPO, SAPO and REINFORCE, KL penalties, entropy bonus and importance corrections by sequence, against formulas by hand.

Shape suffixes: N scored tokens, P pairs, Q sequences, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lockstep.algorithms.losses.base import rest_of_sequence
from lockstep.algorithms.losses.gmpo import gmpo
from lockstep.algorithms.losses.reinforce import reinforce
from lockstep.algorithms.losses.sapo import sapo
from lockstep.config.train import TrainConfig
from lockstep.engine.losses.policy import Scored, kl_k1, kl_k2, kl_k3, policy_loss

OLD = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64)
ADVANTAGE_P = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)
RATIO = torch.tensor([2.0, 0.1, 1.1, 1.5], dtype=torch.float64)
NEW = OLD + RATIO.log()
SEQUENCE_P = torch.tensor([0, 0, 1, 1])


def gradient(function, new_P: torch.Tensor) -> torch.Tensor:
    new_P = new_P.detach().requires_grad_()
    [slope_P] = torch.autograd.grad(function(new_P).sum(), new_P)
    return slope_P


def scored(new_N: torch.Tensor, old_N: torch.Tensor = OLD, sampling_N: torch.Tensor = OLD, **more) -> Scored:
    """Four tokens of two sequences, weights 1 and 2, advantages 1 and -0.5."""
    return Scored(
        new_N=new_N,
        sampling_N=sampling_N,
        old_N=old_N,
        token_P=torch.arange(4),
        sequence_P=SEQUENCE_P,
        advantage_Q=torch.tensor([1.0, -0.5], dtype=torch.float64),
        weight_Q=torch.tensor([1.0, 2.0], dtype=torch.float64),
        **more,
    )


def test_reinforce_closed_form():
    loss_P, clipped_P = reinforce(NEW, ADVANTAGE_P)
    torch.testing.assert_close(loss_P, -ADVANTAGE_P * NEW)
    assert not clipped_P.any()


def test_sapo_closed_form():
    """The gate's slope is 1 at r = 1 for every tau, so that the step on policy is the policy gradient."""
    loss_P, halved_P = sapo(NEW, OLD, ADVANTAGE_P, 1.0, 2.0)
    tau = [1.0, 2.0, 1.0, 2.0]
    by_hand = [
        -4 / t * a / (1 + math.exp(-t * (r - 1)))
        for t, a, r in zip(tau, ADVANTAGE_P.tolist(), RATIO.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss_P, torch.tensor(by_hand, dtype=torch.float64))
    assert halved_P.tolist() == [False, True, False, False]  # slopes 0.79, 0.49, 1.00, 0.79
    torch.testing.assert_close(gradient(lambda new: sapo(new, OLD, ADVANTAGE_P, 1.0, 2.0)[0], OLD), -ADVANTAGE_P)
    config = TrainConfig(loss="sapo", loss_parameters={"tau_negative": 9.0})
    sharp = gradient(lambda new: policy_loss(scored(new), config).loss, NEW)
    soft = gradient(lambda new: policy_loss(scored(new), TrainConfig(loss="sapo")).loss, NEW)
    assert sharp[:2].tolist() == soft[:2].tolist()  # A > 0
    assert 0 < sharp[3] < soft[3] / 5  # A < 0, r = 1.5


def test_gmpo_closed_form():
    """A > 0: ratios 2 and 0.1, clipped above only. A < 0: 1.1 and 0.2, clipped below only."""
    ratio = torch.tensor([2.0, 0.1, 1.1, 0.2], dtype=torch.float64)
    advantage_Q = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loss_P, clipped_P = gmpo(OLD + ratio.log(), OLD, advantage_Q, SEQUENCE_P, 0.5, 1.5)
    first, second = math.sqrt(1.5 * 0.1), math.sqrt(1.1 * 0.5)
    torch.testing.assert_close(loss_P, torch.tensor([-first] * 2 + [2 * second] * 2, dtype=torch.float64))
    assert clipped_P.tolist() == [True, False, False, True]
    slope = gradient(lambda new: gmpo(new, OLD, advantage_Q, SEQUENCE_P, 0.5, 1.5)[0], OLD + ratio.log())
    torch.testing.assert_close(slope, torch.tensor([0, -first, 2 * second, 0], dtype=torch.float64))
    low, high = TrainConfig(loss="gmpo").clip_range
    assert (low, high) == pytest.approx((math.exp(-0.4), math.exp(0.4)))


def test_gradients_of_the_kl_estimates():
    """Over a whole distribution: k2 in the loss, k1 in the reward and any corrected estimate have the divergence's gradient.
    k1 in the loss has none, which is why it is refused."""
    logits_V = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64, requires_grad=True)
    reference_V = torch.tensor([1.0, -1.5, -0.8], dtype=torch.float64).log_softmax(0)
    policy_V = logits_V.log_softmax(0)
    exact = torch.autograd.grad((policy_V.exp() * (policy_V - reference_V)).sum(), logits_V, retain_graph=True)[0]
    fixed_V = policy_V.detach()

    def expected(penalty_V: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((fixed_V.exp() * penalty_V).sum(), logits_V, retain_graph=True)[0]

    torch.testing.assert_close(expected(kl_k2(policy_V, reference_V)), exact)
    torch.testing.assert_close(expected(kl_k1(fixed_V, reference_V) * policy_V), exact)
    for estimate in (kl_k1, kl_k3):
        torch.testing.assert_close(expected((policy_V - fixed_V).exp() * estimate(policy_V, reference_V)), exact)
    torch.testing.assert_close(expected(kl_k1(policy_V, reference_V)), torch.zeros_like(exact))
    assert (expected(kl_k3(policy_V, reference_V)) - exact).abs().max() > 0.05  # an approximation


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_leaves_the_advantages(estimator):
    """Each token pays for itself and the later ones of its sequence, by the policy that sampled; a loss by sequence pays once."""
    reference_N = OLD - torch.tensor([0.5, -0.25, 1.0, 0.125], dtype=torch.float64)
    cost = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[estimator](OLD, reference_N)
    row = {"reference_N": reference_N}
    config = TrainConfig(loss="reinforce", kl_coef=0.1, kl_estimator=estimator, kl_in="reward")
    slope = gradient(lambda new: policy_loss(scored(new, **row), config).loss, NEW)
    rest = torch.stack([cost[0] + cost[1], cost[1], cost[2] + cost[3], cost[3]])
    advantage = torch.tensor([1.0, 1.0, -0.5, -0.5], dtype=torch.float64) - 0.1 * rest
    torch.testing.assert_close(slope, -advantage * torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64))
    by_sequence = config.model_copy(update={"loss": "gmpo", "clip_low": 1.0, "clip_high": 1e9})
    slope = gradient(lambda new: policy_loss(scored(new, **row), by_sequence).loss, OLD)
    torch.testing.assert_close(
        slope, -advantage[[0, 0, 2, 2]] * torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    )
    sums = policy_loss(scored(NEW, **row), config).sums
    assert float(sums["kl_reference"]) == pytest.approx(float(cost[0] + cost[1] + 2 * (cost[2] + cost[3])))
    assert float(sums["loss"]) == float(sums["loss_policy"])  # the penalty is in the advantages


def test_kl_corrected_closed_form():
    reference_N = OLD - 0.3
    config = TrainConfig(loss="reinforce", kl_coef=0.1, kl_corrected=True)
    plain = gradient(lambda new: policy_loss(scored(new), TrainConfig(loss="reinforce")).loss, NEW)
    pulled = gradient(lambda new: policy_loss(scored(new, reference_N=reference_N), config).loss, NEW)
    weight = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(pulled - plain, 0.1 * weight * RATIO * (NEW - reference_N))


def test_entropy_bonus_closed_form():
    """The gradient flows into the entropy with the token's weight; without a coefficient there is none."""
    config = TrainConfig(loss="reinforce", entropy_coef=0.01)
    entropy_N = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    with_bonus = policy_loss(scored(NEW, entropy_N=entropy_N), config)
    [slope_N] = torch.autograd.grad(with_bonus.loss, entropy_N)
    torch.testing.assert_close(slope_N, -0.01 * torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64))
    without = policy_loss(scored(NEW, entropy_N=entropy_N), TrainConfig(loss="reinforce"))
    assert not without.loss.requires_grad
    assert float(with_bonus.loss) == pytest.approx(float(without.loss) - 0.01 * (1 + 2 + 2 * 3 + 2 * 4))
    assert config.trains_without_signal


WEIGHTS = {
    ("masked", "token"): [1.5, 0.0, 0.5, 1.0],  # 1.5, 3.0, 0.5, 1.0
    ("masked", "sequence"): [0.0, 0.0, 0.5, 0.5],  # 4.5 and 0.5
    ("masked", "geometric"): [0.0, 0.0, 0.5**0.5, 0.5**0.5],  # 2.12 and 0.71
    ("rejected", "token"): [1.0, 0.0, 0.0, 1.0],
    ("rejected", "sequence"): [0.0, 0.0, 0.0, 0.0],
    ("rejected", "geometric"): [0.0, 0.0, 1.0, 1.0],
    ("truncated", "sequence"): [2.0, 2.0, 0.5, 0.5],
}


@pytest.mark.parametrize(("correction", "level"), WEIGHTS)
def test_importance_by_sequence_closed_form(correction, level):
    """Weights trainer/server of 1.5, 3, 0.5 and 1 with cap 2 and, for rejection, floor 0.6."""
    sampling_N = OLD - torch.tensor([1.5, 3.0, 0.5, 1.0], dtype=torch.float64).log()
    floor: dict[str, Any] = {"importance_floor": 0.6} if correction == "rejected" else {}
    config = TrainConfig(
        loss="ppo", old_logprobs="trainer", importance_correction=correction, importance_level=level, **floor
    )
    slope = gradient(lambda new: policy_loss(scored(new, sampling_N=sampling_N), config).loss, OLD)
    plain = gradient(lambda new: policy_loss(scored(new), TrainConfig(loss="ppo")).loss, OLD)
    torch.testing.assert_close(slope, plain * torch.tensor(WEIGHTS[correction, level], dtype=torch.float64))


def test_the_rest_of_a_sequence():
    values_P = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    rest_P = rest_of_sequence(values_P, torch.tensor([0, 0, 2, 2, 2]), 3)
    assert rest_P.tolist() == [3.0, 2.0, 28.0, 24.0, 16.0]
