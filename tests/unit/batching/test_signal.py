"""What is signal and what is noise: rewards to advantages, and which sequences are computed at all.

Shape suffixes: N scored tokens, P pairs, Q sequences.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from lockstep.algorithms.advantages import find_advantage
from lockstep.batching.advantages import REWARD_EPS, advantages
from lockstep.batching.pack import load_batch, minibatch_rows, save_batch
from lockstep.batching.packed_batch import (
    PackedBatch,
    has_signal,
    loss_divisor,
    scored_row,
    total_weight,
    unpacked_weight,
)
from lockstep.batching.prepare import prepare
from lockstep.config.train import TrainConfig
from lockstep.engine.losses.policy import policy_loss, scored_tensors
from lockstep.rollouts.trajectory import TrajectoryGroup
from random_batches import choice, trajectory

VOCABULARY = 50


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(os.urandom(4), "little"))


def group(random: np.random.Generator, rewards: list[float], lengths: list[int] | None = None) -> TrajectoryGroup:
    """Replies of random tokens to one prompt."""
    prompt = random.integers(1, VOCABULARY, 3).tolist()
    sizes = lengths or random.integers(1, 9, len(rewards)).tolist()
    return TrajectoryGroup(
        trajectories=[
            trajectory(
                choice(
                    prompt, random.integers(1, VOCABULARY, n).tolist(), logprobs=(-random.exponential(size=n)).tolist()
                ),
                reward=reward,
            )
            for reward, n in zip(rewards, sizes, strict=True)
        ]
    )


def grpo(rewards: list[float], eps: float = REWARD_EPS) -> np.ndarray:
    return advantages([rewards], find_advantage("grpo"), eps=eps)


def gradient(batch: PackedBatch, config: TrainConfig) -> tuple[torch.Tensor, float]:
    """(gradient of the normalised loss for a "policy" that is a table by token id, the loss), minibatch by minibatch."""
    policy_V = torch.linspace(-3, -1, VOCABULARY).double().requires_grad_()
    count, total = config.minibatches, torch.zeros((), dtype=torch.float64)
    for number in range(count):
        rows = minibatch_rows(batch.rows, count, number)
        weight = loss_divisor(batch, rows, count)
        for row in rows:
            scored = scored_row(batch, row)
            new_N = policy_V[torch.from_numpy(scored.target_N)]
            total = total + policy_loss(scored_tensors(scored, new_N), config).loss / weight
    total.backward()
    assert policy_V.grad is not None
    return policy_V.grad, float(total)


def in_another_order(random: np.random.Generator, terms: np.ndarray) -> float:
    total = np.float32(0)
    for term in random.permutation(terms):
        total = np.float32(total + term)
    return float(total)


def test_a5_rewards_that_differ_by_fp32_rounding_are_no_signal(random):
    """One reward, its twenty fp32 terms added up in nine orders; and the same beside a reward that really differs.

    Nine, since an even number may fall into two halves, whose advantages are exactly 1 and -1.
    """
    terms = random.uniform(0.1, 1, 20).astype(np.float32)
    rewards = [in_another_order(random, terms) for _ in range(9)]
    while len(set(rewards)) == 1:
        rewards[0] = in_another_order(random, random.permutation(terms))
    prepared = prepare(
        [group(random, rewards), group(random, [0.0, 1.0])], model_name="m", step=0, config=TrainConfig()
    )
    assert grpo(rewards).tolist() == [0.0] * 9
    assert prepared.metrics["groups_without_signal"] == 1
    assert prepared.metrics["sequences_not_computed"] == 9
    assert np.abs(grpo([*rewards, rewards[0] * 1.001])).max() > 1  # a difference of a thousandth trains
    for scale in (1e-6, 1e6):  # the scale of the rewards does not matter
        assert grpo([reward * scale for reward in rewards]).tolist() == [0.0] * 9
    # Without an eps this is what trains at full strength.
    assert np.abs(grpo(rewards, eps=0.0)).max() > 1


@pytest.mark.parametrize(("loss", "minibatches"), [("cispo", 1), ("ppo", 1), ("gspo", 1), ("cispo", 2)])
def test_a6_groups_without_signal_are_not_computed_and_change_nothing(random, loss, minibatches, tmp_path):
    """Loss and gradient with the quiet sequences left out equal those with all of them; with a KL penalty they stay."""
    groups = [group(random, [0.0, 1.0, 0.5, 0.5], [8, 6, 7, 8]), group(random, [1.0] * 6), group(random, [0.0, 2.0])]
    config = TrainConfig(loss=loss, minibatches=minibatches, row_length=32 // minibatches)
    prepared = prepare(groups, model_name="m", step=0, config=config, multiple=1)
    assert prepared.metrics["sequences_not_computed"] == 6
    assert prepared.metrics["groups_without_signal"] == 1
    assert len(prepared.batch.sequence_ids) == 6
    save_batch(prepared.batch, tmp_path / "b")
    assert unpacked_weight(load_batch(tmp_path / "b")) == unpacked_weight(prepared.batch) > 0
    penalised = config.model_copy(update={"kl_coef": 1e-9})
    every = prepare(groups, model_name="m", step=0, config=penalised, multiple=1)
    assert len(every.batch.sequence_ids) == 12
    assert total_weight(every.batch) == pytest.approx(total_weight(prepared.batch) + unpacked_weight(prepared.batch))
    if minibatches == 1:  # with several, other rows come together
        ours, loss_ours = gradient(prepared.batch, config)
        theirs, loss_theirs = gradient(every.batch, config)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # weights are stored in fp32
        assert loss_ours == pytest.approx(loss_theirs, rel=1e-6, abs=1e-9)
    silent = prepare([group(random, [1.0] * 4, [8] * 4)], model_name="m", step=0, config=config, multiple=1)
    assert not has_signal(silent.batch, range(silent.batch.rows))
    assert has_signal(prepared.batch, range(prepared.batch.rows))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_constant_length_divides_by_trajectories_alone(random, minibatches, tmp_path):
    """Dr. GRPO: the gradient of a token does not depend on how long the batch's replies are."""
    config = TrainConfig(
        loss="reinforce",
        advantage="dr_grpo",
        token_normalization="constant",
        constant_length=100,
        minibatches=minibatches,
    )
    groups = [group(random, [0.0, 1.0], [3, 9]), group(random, [1.0, 1.0], [50, 2]), group(random, [0.0, 4.0], [8, 5])]
    batch = prepare(groups, model_name="m", step=0, config=config).batch
    save_batch(batch, tmp_path / "b")
    assert loss_divisor(load_batch(tmp_path / "b"), [], minibatches) == 6 * 100 / minibatches  # the quiet group counts
    if minibatches == 1:
        expected_V = torch.zeros(VOCABULARY, dtype=torch.float64)
        for member, advantage in ((groups[0], 0.5), (groups[2], 2.0)):
            for trajectory_, sign in zip(member.trajectories, (-1, 1), strict=True):
                for token in (trajectory_.choices[0].model_extra or {})["token_ids"]:
                    expected_V[token] -= sign * advantage / 600
        torch.testing.assert_close(gradient(batch, config)[0], expected_V, rtol=1e-6, atol=1e-9)


def test_long_trajectories_lose_reward(random):
    """Up to 6 sampled tokens nothing, at 10 all, half of it between; rewards that are equal otherwise then teach brevity."""
    config = TrainConfig(overlong_tokens=10, overlong_buffer=4, overlong_penalty=0.5, advantage="dr_grpo")
    groups = [group(random, [1.0] * 4, [2, 6, 8, 30])]
    prepared = prepare(groups, model_name="m", step=0, config=config)
    by_hand = np.array([1.0, 1.0, 0.75, 0.5]) - 0.8125
    np.testing.assert_allclose(sorted(prepared.batch.sequence_advantage_Q), sorted(by_hand), rtol=1e-6)
    assert prepared.metrics["overlong_penalty"] == pytest.approx(0.1875)
    assert prepared.metrics["reward"] == 1.0
    assert prepared.metrics["groups_without_signal"] == 0


def test_a2_gspo_weighs_every_sequence_the_same(random):
    """Two trajectories of 10 and 1,000 tokens with opposite advantages: equal shares of the gradient, as the paper's 1/G."""
    both = group(random, [0.0, 1.0], lengths=[10, 1000])

    def shares(config: TrainConfig) -> list[float]:
        batch = prepare([both], model_name="m", step=0, config=config).batch
        sums = [0.0, 0.0]
        for row in range(batch.rows):
            scored = scored_row(batch, row)
            new_N = torch.tensor(scored.sampling_N, dtype=torch.float64, requires_grad=True)
            tensors = scored_tensors(scored, new_N, old_N=new_N)
            policy_loss(tensors, config).loss.backward()
            assert new_N.grad is not None
            for pair, sequence in enumerate(scored.sequence_P):
                slot = int(scored.names_Q[sequence].startswith("group 0, trajectory 1"))
                sums[slot] += abs(float(new_N.grad[scored.token_P[pair]]))
        return sums

    short, long = shares(TrainConfig(loss="gspo"))
    assert short == pytest.approx(long, rel=1e-6)
    short, long = shares(TrainConfig(loss="gspo", token_normalization="token"))
    assert short * 100 == pytest.approx(long, rel=1e-6)
    assert TrainConfig(loss="cispo").weighs_by == TrainConfig(loss="ppo").weighs_by == "token"
