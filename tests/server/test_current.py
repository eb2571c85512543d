"""Tokens that an earlier step sampled show the policy's own change: they stay out of the mismatch, and of nothing else.

Shape suffix: N scored tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_check import validate
from lockstep.batching.pack import load_batch, save_batch
from lockstep.batching.packed_batch import scored_row
from lockstep.batching.prepare import prepare
from lockstep.config.train import TrainConfig
from lockstep.engine.losses.policy import finish_metrics, policy_loss, reduce_sums, scored_tensors
from lockstep.metrics.mismatch import logprob_mismatch
from lockstep.rollouts.trajectory import TrajectoryGroup
from random_batches import choice, seeds, trajectory

CONFIG = TrainConfig(max_steps_off_policy=3)


def spans(*parts: tuple[int, int]) -> list[dict]:
    """Weight versions of `(step, tokens)` parts in order."""
    described, start = [], 0
    for step, tokens in parts:
        described.append({"version": f"m@{step}", "start": start, "end": start + tokens})
        start += tokens
    return described


def mixed(random: np.random.Generator):
    """A group whose choices were sampled by step 2, step 3, or both, and which of their tokens step 3 sampled, in order."""
    trajectories, current = [], []
    for number in range(4):
        old, new = int(random.integers(0, 4)), int(random.integers(0, 4)) + 1
        count = old + new
        made = choice(
            [1, 2, 3 + number],
            random.integers(9, size=count).tolist(),
            logprobs=(-random.exponential(size=count)).tolist(),
            weight_versions=spans((2, old), (3, new)),
        )
        trajectories.append(trajectory(made, reward=float(number)))
        current.append([False] * old + [True] * new)
    return TrajectoryGroup(trajectories=trajectories), current


def metrics_of(batch, drift) -> dict[str, float]:
    parts = []
    for row in range(batch.rows):
        scored = scored_row(batch, row)
        new_N = torch.from_numpy(scored.sampling_N).double() + torch.from_numpy(drift[row, scored.index_N])
        parts.append(policy_loss(scored_tensors(scored, new_N), CONFIG))
    return finish_metrics(*reduce_sums(parts))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, tight=st.booleans())
def test_only_the_current_steps_tokens_count(seed, tight, tmp_path_factory):
    random = np.random.default_rng(seed)
    group, current = mixed(random)
    config = CONFIG.model_copy(update={"row_length": 64 if tight else None})
    batch = prepare([group], model_name="m", step=3, config=config).batch
    validate(batch)
    path = tmp_path_factory.mktemp("batch") / "batch.safetensors"
    save_batch(batch, path)
    batch = load_batch(path)
    chosen = batch.current_RS
    assert chosen is not None
    for number, flags in enumerate(current):
        assert chosen[batch.row_Q[number], batch.path_index(number)[-len(flags) :]].tolist() == flags
    assert chosen.sum() == sum(map(sum, current))
    drift = random.normal(size=batch.tokens_RS.shape) * np.where(chosen, 0.01, 1.0)
    metrics = metrics_of(batch, drift)
    sampled = batch.logprobs_RS[chosen].astype(np.float64)
    expected = logprob_mismatch(sampled, sampled + drift[chosen])
    assert metrics["mismatch"] == pytest.approx(expected.mean_abs, rel=1e-5)
    assert metrics["mismatch_pct"] == pytest.approx(expected.mean_abs_pct, rel=1e-5)
    assert metrics["mismatch_kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert metrics["mismatch_max"] == pytest.approx(expected.largest, rel=1e-5)
    every = batch.logprobs_RS[batch.loss_mask_RS].astype(np.float64)
    assert metrics["kl"] == pytest.approx(logprob_mismatch(every, every + drift[batch.loss_mask_RS]).kl, rel=1e-4)


def test_rollouts_of_earlier_steps_alone_have_no_mismatch():
    group, _ = mixed(np.random.default_rng(0))
    batch = prepare([group], model_name="m", step=4, config=CONFIG).batch
    assert batch.current_RS is not None
    assert not batch.current_RS.any()
    metrics = metrics_of(batch, np.ones(batch.tokens_RS.shape))
    assert not [name for name in metrics if name.startswith("mismatch")]
    assert metrics["kl"] > 0.5
