"""Losses against closed forms written out by hand, and against the unpacked rows they must equal.

Shape suffixes: N scored tokens, P pairs, Q sequences.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.algorithms.losses import find_loss, named_losses
from lockstep.algorithms.losses.base import Clips, LossInputs
from lockstep.algorithms.losses.cispo import cispo
from lockstep.algorithms.losses.gspo import gspo
from lockstep.algorithms.losses.ppo import ppo_clip
from lockstep.batching.pack import minibatch_rows, pack
from lockstep.batching.packed_batch import PackedBatch, scored_row, total_weight
from lockstep.config.train import TrainConfig
from lockstep.engine.losses.check import check_loss
from lockstep.engine.losses.policy import (
    Scored,
    finish_metrics,
    kl_k3,
    masked,
    policy_loss,
    reduce_sums,
    scored_tensors,
    truncated,
)
from lockstep.errors import ConfigError
from random_batches import random_sequences, seeds


def gradient(function, new_P: torch.Tensor) -> torch.Tensor:
    new_P = new_P.detach().requires_grad_()
    function(new_P).sum().backward()
    assert new_P.grad is not None
    return new_P.grad


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


OLD = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64)
ADVANTAGE = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)
RATIO = torch.tensor([2.0, 0.1, 1.1, 1.5], dtype=torch.float64)
NEW = OLD + RATIO.log()


def test_cispo_closed_form():
    loss_P, clipped_P = cispo(NEW, OLD, ADVANTAGE, 0.5, 1.2)
    weight = torch.tensor([1.2, 0.5, 1.1, 1.2], dtype=torch.float64)
    torch.testing.assert_close(loss_P, -weight * ADVANTAGE * NEW)
    assert clipped_P.tolist() == [True, True, False, True]
    # Clipped tokens keep their gradient: that is what distinguishes CISPO from PPO.
    torch.testing.assert_close(gradient(lambda new: cispo(new, OLD, ADVANTAGE, 0.5, 1.2)[0], NEW), -weight * ADVANTAGE)


def test_ppo_closed_form():
    loss_P, clipped_P = ppo_clip(NEW, OLD, ADVANTAGE, 0.8, 1.2)
    # A > 0, r = 2: bound at 1.2. A < 0, r = 0.1: bound at 0.8. Inside: r. A < 0, r = 1.5: the worse, unclipped.
    expected = torch.tensor([-1.2, 2 * 0.8, -0.55, 1.5], dtype=torch.float64)
    torch.testing.assert_close(loss_P, expected)
    assert clipped_P.tolist() == [True, True, False, False]
    expected_gradient = torch.tensor([0.0, 0.0, -0.55, 1.5], dtype=torch.float64)
    torch.testing.assert_close(gradient(lambda new: ppo_clip(new, OLD, ADVANTAGE, 0.8, 1.2)[0], NEW), expected_gradient)


def test_dual_clip_closed_form():
    """A < 0: no worse than `dual |A|`, and no gradient beyond; A > 0 as before. 22,026 for one token is now 3."""
    old = torch.tensor([-12.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    new = old + torch.tensor([10.0, math.log(2.5), math.log(4.0), 5.0], dtype=torch.float64)
    advantage = torch.tensor([-1.0, -2.0, -2.0, 1.0], dtype=torch.float64)
    loss_P, clipped_P = ppo_clip(new, old, advantage, 0.8, 1.2, 3.0)
    torch.testing.assert_close(loss_P, torch.tensor([3.0, 5.0, 6.0, -1.2], dtype=torch.float64))
    assert clipped_P.tolist() == [True, False, True, True]
    expected = torch.tensor([0.0, 5.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        gradient(lambda logprobs: ppo_clip(logprobs, old, advantage, 0.8, 1.2, 3.0)[0], new), expected
    )
    assert float(ppo_clip(new, old, advantage, 0.8, 1.2)[0][0]) == pytest.approx(math.exp(10))
    far = scored(new, old, advantage_Q=torch.tensor([-1.0, -1.0], dtype=torch.float64))
    assert float(policy_loss(far, TrainConfig(loss="ppo")).loss) == pytest.approx(3.0 + 2.5 + 3.0 + 3.0)
    assert float(policy_loss(far, TrainConfig(loss="ppo", clip_dual=50.0)).loss) == pytest.approx(50 + 2.5 + 4 + 50)


def test_ppo_on_policy_gradient_is_the_policy_gradient():
    torch.testing.assert_close(gradient(lambda new: ppo_clip(new, OLD, ADVANTAGE, 0.8, 1.2)[0], OLD), -ADVANTAGE)


def test_gspo_closed_form():
    sequence_P = torch.tensor([0, 0, 0, 1])
    advantage_Q = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ratio_0 = (2.0 * 0.1 * 1.1) ** (1 / 3)
    loss_P, clipped_P = gspo(NEW, OLD, advantage_Q, sequence_P, 0.5, 2.0)
    expected = torch.tensor([-ratio_0] * 3 + [2 * 1.5], dtype=torch.float64)
    torch.testing.assert_close(loss_P, expected)
    assert not clipped_P.any()
    # d s / d log pi_t = s / n; every one of the n pairs carries s.
    expected_gradient = torch.tensor([-ratio_0] * 3 + [3.0], dtype=torch.float64)
    torch.testing.assert_close(
        gradient(lambda new: gspo(new, OLD, advantage_Q, sequence_P, 0.5, 2.0)[0], NEW), expected_gradient
    )
    assert gspo(NEW, OLD, advantage_Q, sequence_P, 0.7, 1.4)[1].tolist() == [False] * 3 + [False]
    assert gspo(NEW, OLD, -advantage_Q, sequence_P, 0.7, 1.4)[1].tolist() == [True] * 4


def test_k3_closed_form_and_expectation():
    reference = logs(0.2, 0.3, 0.5)
    policy = logs(0.6, 0.3, 0.1)
    r = (reference - policy).exp()
    torch.testing.assert_close(kl_k3(policy, reference), r - 1 - r.log())
    assert (kl_k3(policy, reference) >= 0).all()
    assert kl_k3(policy, policy).tolist() == [0.0] * 3
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_k3(policy, reference)).sum(), exact)
    torch.testing.assert_close(gradient(lambda new: kl_k3(new, reference), policy), 1 - r)


def test_importance_weights_closed_form():
    log_weight = logs(0.2, 1.0, 3.0, 10.0)
    assert truncated(log_weight, 0.0, 2.0).tolist() == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert masked(log_weight, 0.0, 4.0).tolist() == pytest.approx([0.2, 1.0, 3.0, 0.0])
    assert masked(log_weight, 0.5, 4.0).tolist() == pytest.approx([0.0, 1.0, 3.0, 0.0])


def scored(new_P: torch.Tensor, sampling_P: torch.Tensor, **changes) -> Scored:
    """Four tokens of two sequences, weight 1."""
    base = Scored(
        new_N=new_P,
        sampling_N=sampling_P,
        old_N=sampling_P,
        token_P=torch.arange(4),
        sequence_P=torch.tensor([0, 0, 1, 1]),
        advantage_Q=torch.tensor([1.0, -0.5], dtype=new_P.dtype),
        weight_Q=torch.ones(2, dtype=new_P.dtype),
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("loss", sorted(named_losses()))
def test_kl_coefficient_changes_the_gradient_or_is_refused(loss):
    reference_N = OLD + 0.3
    plain = gradient(lambda new: policy_loss(scored(new, OLD), TrainConfig(loss=loss)).loss, NEW)
    config = TrainConfig(loss=loss, kl_coef=0.1)
    pulled = gradient(lambda new: policy_loss(scored(new, OLD, reference_N=reference_N), config).loss, NEW)
    torch.testing.assert_close(pulled - plain, 0.1 * (1 - (reference_N - NEW).exp()))
    with pytest.raises(ConfigError, match="kl_coef"):
        policy_loss(scored(NEW, OLD), config)
    with pytest.raises(ConfigError, match="kl_coef"):
        policy_loss(scored(NEW, OLD, reference_N=reference_N), TrainConfig(loss=loss))


@pytest.mark.parametrize("loss", sorted(named_losses()))
@pytest.mark.parametrize("correction", ["truncated", "masked", "icepop"])
def test_correction_multiplies_once(loss, correction):
    """The weight is trainer/server, never the policy ratio again: with both equal it is 1 and nothing changes."""
    config = TrainConfig(loss=loss, old_logprobs="trainer", importance_correction=correction)
    plain = TrainConfig(loss=loss, old_logprobs="trainer")
    same = scored(NEW, OLD, old_N=OLD)
    torch.testing.assert_close(policy_loss(same, config).loss, policy_loss(same, plain).loss)
    shift = math.log(1.5)
    shifted = scored(NEW, OLD - shift, old_N=OLD)
    without = policy_loss(shifted, plain)
    torch.testing.assert_close(policy_loss(shifted, config).loss, 1.5 * without.loss)
    far = scored(NEW, OLD - math.log(100), old_N=OLD)
    factor = 2.0 if correction == "truncated" else 0.0
    torch.testing.assert_close(policy_loss(far, config).loss, factor * policy_loss(far, plain).loss)


def test_no_nan_from_empty_rows_or_zero_advantages():
    empty = torch.empty(0, dtype=torch.float64)
    none = torch.empty(0, dtype=torch.int64)
    for loss in named_losses():
        new_N = empty.clone().requires_grad_()
        part = policy_loss(Scored(new_N, empty, empty, none, none, empty, empty), TrainConfig(loss=loss))
        part.loss.backward()
        assert part.loss.item() == 0
        assert all(math.isfinite(value) for value in finish_metrics(*reduce_sums([part])).values())
        still = scored(NEW, OLD, advantage_Q=torch.zeros(2, dtype=torch.float64))
        assert (
            gradient(
                lambda new, s=still, c=loss: policy_loss(dataclasses.replace(s, new_N=new), TrainConfig(loss=c)).loss,
                NEW,
            ).tolist()
            == [0.0] * 4
        )
        single = Scored(NEW[:1], OLD[:1], OLD[:1], torch.tensor([0]), torch.tensor([0]), ADVANTAGE[:1], ADVANTAGE[:1])
        assert all(
            math.isfinite(v)
            for v in finish_metrics(*reduce_sums([policy_loss(single, TrainConfig(loss=loss))])).values()
        )


def test_metrics_closed_form():
    config = TrainConfig(loss="ppo")
    entropy_N = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    metrics = finish_metrics(*reduce_sums([policy_loss(scored(NEW, OLD, entropy_N=entropy_N), config)]))
    ratio = RATIO.numpy()
    assert metrics["mismatch"] == pytest.approx(np.abs(np.log(ratio)).mean())
    assert metrics["mismatch_pct"] == pytest.approx(100 * np.abs(np.log(ratio)).sum() / -OLD.sum().item())
    assert metrics["mismatch_max"] == pytest.approx(np.abs(np.log(ratio)).max())
    assert metrics["kl"] == pytest.approx((ratio - 1 - np.log(ratio)).mean())
    assert metrics["ess"] == pytest.approx(ratio.sum() ** 2 / (4 * (ratio**2).sum()))
    assert metrics["ratio_mean"] == pytest.approx(ratio.mean())
    assert metrics["ratio_max"] == pytest.approx(2.0)
    assert metrics["clip_fraction"] == 0.25  # r = 2 with A > 0; 0.1 with A > 0 and 1.5 with A < 0 are not cut
    assert metrics["entropy"] == 2.5
    assert metrics["tokens_scored"] == 4


def token_table(batch: PackedBatch, table: np.ndarray, row: int) -> np.ndarray:
    """A "policy": the logprob of a token depends on its id and its position only, so it is equal packed and unpacked."""
    index = scored_row(batch, row).index_N
    return table[batch.tokens_RS[row, index], batch.positions_RS[row, index]]


def batch_loss(
    batch: PackedBatch, rows: range, parameter: torch.Tensor, config: TrainConfig, tables: list[np.ndarray]
) -> tuple:
    """(normalised loss, metrics) of `rows`, as an engine computes them: a sum per row over the global weight."""
    parts, total = [], torch.zeros((), dtype=torch.float64)
    for row in rows:
        values = [torch.tensor(token_table(batch, table, row)) for table in tables]
        index = scored_row(batch, row).index_N
        new_N = values[0] + parameter[torch.tensor(batch.tokens_RS[row, index], dtype=torch.int64)]
        packed_row = scored_tensors(scored_row(batch, row), new_N, old_N=values[1], reference_N=values[2])
        part = policy_loss(dataclasses.replace(packed_row, sampling_N=values[3]), config)
        parts.append(part)
        total = total + part.loss
    return total / total_weight(batch, rows), parts


CONFIGS = [
    TrainConfig(
        loss=loss, kl_coef=0.1, old_logprobs="trainer", importance_correction=correction, clip_low=0.1, clip_high=0.1
    )
    for loss in ("cispo", "ppo", "gspo")
    for correction in (None, "truncated", "icepop")
]
MORE = [
    TrainConfig(loss="gmpo", clip_low=0.1, clip_high=0.1, kl_coef=0.1, kl_estimator="k2"),
    TrainConfig(loss="sapo", kl_coef=0.1, kl_estimator="k1", kl_corrected=True),
    TrainConfig(loss="reinforce", kl_coef=0.1, kl_estimator="k1", kl_in="reward", old_logprobs="trainer"),
    TrainConfig(loss="gspo", clip_low=0.1, clip_high=0.1, kl_coef=0.1, kl_in="reward"),
    TrainConfig(
        loss="ppo",
        kl_coef=0.1,
        old_logprobs="trainer",
        importance_correction="rejected",
        importance_level="sequence",
        importance_floor=0.1,
        importance_cap=9.0,
    ),
]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, leaves=st.integers(2, 16), config=st.sampled_from(CONFIGS + MORE), tight=st.booleans())
def test_packed_trees_equal_unpacked_rows(seed, leaves, config, tight):
    """Value and gradient of every loss, on a tree in one row or several, equal those of one row per sequence, to fp64."""
    random = np.random.default_rng(seed)
    sequences = random_sequences(random, leaves, vocabulary=4)
    longest = max(map(len, sequences))
    tables = [-random.exponential(size=(4, longest)) for _ in range(4)]
    advantages, weights = random.normal(size=leaves), random.uniform(0.1, 2, size=leaves)
    outcomes = []
    for share in (True, False):
        length = longest if tight or not share else 4096
        batch = pack(sequences, advantages, weights, row_length=length, share_prefixes=share, multiple=1)
        parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        loss, parts = batch_loss(batch, range(batch.rows), parameter, config, tables)
        loss.backward()
        assert parameter.grad is not None
        metrics = finish_metrics(*reduce_sums(parts))
        outcomes.append((loss.item(), parameter.grad.numpy(), metrics["clip_fraction"], metrics["loss"]))
    for packed, plain in zip(*outcomes, strict=True):
        np.testing.assert_allclose(packed, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS[::3] + MORE, ids=lambda config: config.loss)
def test_micro_batches_and_ranks_equal_one_batch(config):
    """k micro-batches on d ranks: the sums add up to the loss and the metrics of everything in one row."""
    random = np.random.default_rng(7)
    sequences = random_sequences(random, 14, vocabulary=4)
    longest = max(map(len, sequences))
    tables = [-random.exponential(size=(4, longest)) for _ in range(4)]
    advantages, weights = random.normal(size=14), random.uniform(0.1, 2, size=14)
    results = []
    for length, ranks in ((4096, 1), (longest, 1), (longest, 3)):
        batch = pack(sequences, advantages, weights, row_length=length, data=ranks, multiple=1)
        parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        weight = total_weight(batch)
        reduced = []
        for rank in range(ranks):
            own = range(rank, batch.rows, ranks)
            loss, parts = batch_loss(batch, own, parameter, config, tables)
            (loss * total_weight(batch, own) / weight).backward()
            reduced.append(reduce_sums(parts))
        sums = {name: sum(float(part[0][name]) for part in reduced) for name in reduced[0][0]}
        maxima = {name: max(float(part[1][name]) for part in reduced) for name in reduced[0][1]}
        assert parameter.grad is not None
        results.append((finish_metrics(sums, maxima)["loss"], parameter.grad.numpy().copy()))
    for value, grad in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-10)
        np.testing.assert_allclose(grad, results[0][1], rtol=1e-10)


def test_minibatches_normalise_each_by_its_own_weight():
    sequences = random_sequences(np.random.default_rng(3), 12)
    longest = max(map(len, sequences))
    batch = pack(sequences, np.ones(12), np.ones(12), row_length=longest, minibatches=2, multiple=1)
    parts = [total_weight(batch, minibatch_rows(batch.rows, 2, index)) for index in range(2)]
    assert sum(parts) == pytest.approx(sum(sequence.scored for sequence in sequences))


def own_loss(pairs: LossInputs, clips: Clips) -> tuple[torch.Tensor, torch.Tensor]:
    """A user's: plain REINFORCE."""
    return -pairs.advantage_P * pairs.new_P, torch.zeros_like(pairs.new_P, dtype=torch.bool)


def constant(pairs: LossInputs, clips: Clips) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.new_P.detach(), pairs.new_P > 0


def one_number(pairs: LossInputs, clips: Clips) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.new_P.sum(), pairs.new_P > 0


def half_dead(pairs: LossInputs, clips: Clips) -> tuple[torch.Tensor, torch.Tensor]:
    return -pairs.advantage_P.clamp(min=0) * pairs.new_P, pairs.new_P > 0


def raises(pairs: LossInputs, clips: Clips) -> tuple[torch.Tensor, torch.Tensor]:
    raise KeyError("no such thing")


def test_a_users_loss_trains():
    """Its value and gradient in a row are those of the formula."""
    config = TrainConfig(loss="test_loss:own_loss")
    check_loss(config.policy_loss)
    new_P = logs(0.5, 0.2, 0.9, 0.3).requires_grad_()
    row = scored(new_P, logs(0.5, 0.3, 0.8, 0.3))
    [gradient_N] = torch.autograd.grad(policy_loss(row, config).loss, new_P)
    factor_P = (row.weight_Q * row.advantage_Q)[row.sequence_P]
    torch.testing.assert_close(gradient_N, torch.zeros_like(new_P).index_add(0, row.token_P, -factor_P))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("constant", "has no gradient"),
        ("one_number", r"loss is \[\], expected one value for each pair"),
        ("half_dead", "gives some pairs no gradient"),
        ("raises", "KeyError on a trial"),
    ],
)
def test_a_users_loss_that_can_not_train_is_refused(name, says):
    with pytest.raises(ConfigError, match=says):
        check_loss(TrainConfig(loss=f"test_loss:{name}").policy_loss)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere:loss", "can't be imported: No module named 'nowhere'"),
        ("test_loss:nothing", "can't be imported: module 'test_loss' has no attribute 'nothing'"),
        ("test_loss:pytestmark_of_nobody", "can't be imported"),
        ("math:pi", "is a float: expected a PolicyLoss"),
    ],
)
def test_a_users_loss_that_is_none_is_refused(name, says):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(loss=name)


@pytest.mark.parametrize("name", sorted(named_losses()))
def test_every_loss_of_the_library_passes_its_own_check(name):
    check_loss(find_loss(name))
