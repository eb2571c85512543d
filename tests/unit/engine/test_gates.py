"""What a step lets through and what it refuses, and what it changes: the real engine on a tiny model in one process.

Shapes: R rows, S row length.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lockstep.batching.pack import minibatch_rows, pack
from lockstep.batching.packed_batch import PackedBatch, scored_row
from lockstep.config.megatron import Parallel
from lockstep.config.train import TrainConfig
from lockstep.errors import MismatchError
from lockstep.validate.reference.batches import VOCABULARY, sequence

pytestmark = pytest.mark.usefixtures("groups")

SILENT = lambda event: None  # noqa: E731
NOISE = 0.025
"""Standard deviation in nats: a mean difference of 0.02, as server and trainer have in bf16 (benchmarks/README.md)."""


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(os.urandom(4), "little"))


@pytest.fixture(params=["bfloat16", "float32"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return opened(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def opened(folder: Path, dtype: str) -> Any:
    from packing import open_tiny

    trainer = open_tiny("qwen3", folder, dtype, True, Parallel())
    for bucket in trainer.optimizer.buckets:  # it gave the adapter values behind the optimizer's back
        bucket.master.copy_(bucket.weights[bucket.low : bucket.high])
    return trainer


def on_policy(
    trainer: Any, random: np.random.Generator, *, noise: float = 0.0, minibatches: int = 1, count: int = 12
) -> PackedBatch:
    """Replies of 4 to 40 random tokens, one a row, whose sampling log-probabilities are the trainer's and Gaussian noise."""
    from lockstep.engine.steps.score import score

    made = []
    for number in range(count):
        tokens = [int(t) for t in random.integers(3, VOCABULARY, 3 + int(random.integers(4, 41)))]
        made.append(sequence(f"s{number}", tokens, 3, random))
    advantages = random.normal(size=count)
    batch = pack(made, advantages, np.ones(count), row_length=48, minibatches=minibatches, multiple=8)
    scores_RS = score(trainer, batch, SILENT)
    noisy_RS = scores_RS + random.normal(size=scores_RS.shape).astype(np.float32) * noise
    return replace(batch, logprobs_RS=np.where(batch.loss_mask_RS, noisy_RS, np.nan).astype(np.float32))


def state(trainer: Any) -> list[torch.Tensor]:
    kinds = ("weights", "master", "exp_avg", "exp_avg_sq")
    return [getattr(bucket, kind).clone() for bucket in trainer.optimizer.buckets for kind in kinds]


def unchanged(trainer: Any, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, state(trainer), strict=True))


def planted(batch: PackedBatch, minibatch: int, minibatches: int, nats: float) -> PackedBatch:
    """The sampling log-probabilities of one sequence of that minibatch off by `nats` on every token."""
    rows = list(minibatch_rows(batch.rows, minibatches, minibatch))
    row = next(row for row in rows if batch.loss_mask_RS[row].any())
    logprobs_RS = batch.logprobs_RS.copy()
    logprobs_RS[row] -= np.float32(nats)
    return replace(batch, logprobs_RS=logprobs_RS)


def test_a1_gspo_does_not_clip_what_two_programs_round(trainer, random):
    """On policy, with server noise of bf16's size: the default clips nothing; dividing by the server's numbers clips nearly half."""
    from lockstep.engine.steps.train_step import train_step

    batch = on_policy(trainer, random, noise=NOISE, count=40)
    before = train_step(trainer, batch, TrainConfig(loss="gspo", learning_rate=1e-6), None, SILENT)
    assert 0.01 < before["mismatch"] < 0.04  # the noise is there
    assert before["clip_fraction"] == 0.0
    assert before["ratio_mean"] == before["ratio_max"] == 1.0
    split = on_policy(trainer, random, noise=NOISE, minibatches=3)
    metrics = train_step(trainer, split, TrainConfig(loss="gspo", learning_rate=1e-12, minibatches=3), None, SILENT)
    assert metrics["clip_fraction"] == 0.0
    old = TrainConfig(loss="gspo", old_logprobs="sampling", clip_low=3e-4, clip_high=4e-4, learning_rate=1e-6)
    assert train_step(trainer, batch, old, None, SILENT)["clip_fraction"] > 0.1  # 0.47 is expected of 40 sequences


@pytest.mark.parametrize("old", ["sampling", "trainer"])
def test_a3_every_minibatch_is_gated(model, random, old):
    """A sequence that is far off is refused in whichever minibatch it lies, before anything changed; so is a single token."""
    from lockstep.engine.steps.train_step import train_step

    trainer = opened(model, "float32")
    good = on_policy(trainer, random, minibatches=4)
    config = TrainConfig(minibatches=4, old_logprobs=old, max_mismatch=0.2)
    tokens = TrainConfig(minibatches=4, old_logprobs=old, max_mismatch=None, max_token_mismatch=1e-3)
    before = state(trainer)
    for minibatch in range(4):
        bad = planted(good, minibatch, 4, 40.0)  # a row may be no more than four tokens of 260
        with pytest.raises(MismatchError, match=r"more than max_mismatch = 0\.2; weights are unchanged"):
            train_step(trainer, bad, config, None, SILENT)
        with pytest.raises(MismatchError, match=r"more than max_token_mismatch = 0\.001; weights are unchanged"):
            train_step(trainer, planted(good, minibatch, 4, 0.01), tokens, None, SILENT)
    assert unchanged(trainer, before)
    assert trainer.optimizer.count == 0
    assert train_step(trainer, good, config, None, SILENT)["mismatch"] < 1e-5
    assert trainer.optimizer.count == 4
    assert not unchanged(trainer, before)


def test_a3_mismatch_covers_all_minibatches(model, random):
    """It is that of one batch in one update; and a first minibatch with nothing but older tokens does not hide it."""
    from lockstep.engine.steps.train_step import train_step

    trainer = opened(model, "float32")
    batch = on_policy(trainer, random, noise=0.1, minibatches=3)
    expected = [scored_row(batch, row) for row in range(batch.rows)]
    current_RS = batch.loss_mask_RS.copy()
    current_RS[list(minibatch_rows(batch.rows, 3, 0))] = False
    batch = replace(batch, current_RS=current_RS)
    clean_RS = on_policy_scores(trainer, batch)
    drift = np.abs(clean_RS - batch.logprobs_RS)[current_RS]
    metrics = train_step(trainer, batch, TrainConfig(minibatches=3, learning_rate=1e-2), None, SILENT)
    assert metrics["mismatch"] == pytest.approx(float(drift.mean()), rel=1e-4)
    assert metrics["mismatch_max"] == pytest.approx(float(drift.max()), rel=1e-4)
    assert metrics["tokens_scored"] == sum(len(row.index_N) for row in expected)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_a_step_writes_what_it_computed_for_each_token(model, random, tmp_path, minibatches):
    """They are the scores before the first update, of all minibatches, whatever the server's numbers are."""
    from lockstep.engine.steps.train_step import train_step

    trainer = opened(model, "float32")
    batch = on_policy(trainer, random, noise=0.1, minibatches=minibatches)
    before_RS = on_policy_scores(trainer, batch)
    config = TrainConfig(minibatches=minibatches, learning_rate=1e-2)
    train_step(trainer, batch, config, None, SILENT, tmp_path / "logprobs")
    values_RS = load_file(tmp_path / "logprobs")["logprobs_RS"]
    assert np.array_equal(np.isnan(values_RS), ~batch.loss_mask_RS)
    np.testing.assert_allclose(values_RS[batch.loss_mask_RS], before_RS[batch.loss_mask_RS], atol=2e-5)


def on_policy_scores(trainer: Any, batch: PackedBatch) -> np.ndarray:
    from lockstep.engine.steps.score import score

    return score(trainer, batch, SILENT)


def test_a6_a_step_without_signal_changes_nothing(trainer, random):
    """After a step with momentum: six batches without an advantage leave every byte as it is, and are not computed."""
    from lockstep.engine.steps.train_step import train_step

    config = TrainConfig(learning_rate=1e-2, weight_decay=0.1, max_mismatch=None)
    batch = on_policy(trainer, random)
    assert train_step(trainer, batch, config, None, SILENT)["no_signal"] == 0.0
    before, events = state(trainer), []
    silent = replace(batch, sequence_advantage_Q=np.zeros_like(batch.sequence_advantage_Q))
    for _ in range(6):
        metrics = train_step(trainer, silent, config, None, events.append)
        assert metrics["no_signal"] == 1.0
        assert metrics["updates"] == 1.0
        assert metrics["grad_norm"] == metrics["loss"] == 0.0
    assert unchanged(trainer, before)
    assert "forward_backward" not in {event["phase"] for event in events}


def test_a6_a_minibatch_without_signal_takes_no_update(model, random):
    """One of three minibatches is silent, and one has all of its gradient clipped away: a single update is taken."""
    from lockstep.engine.steps.train_step import train_step

    trainer = opened(model, "float32")
    batch = on_policy(trainer, random, minibatches=3)
    parts = [list(minibatch_rows(batch.rows, 3, number)) for number in range(3)]
    silent_Q, clipped_Q = (np.isin(batch.row_Q, parts[number]) for number in (0, 2))
    advantage_Q = np.where(silent_Q, 0, np.abs(batch.sequence_advantage_Q)).astype(np.float32)
    logprobs_RS = batch.logprobs_RS.copy()
    logprobs_RS[np.isin(np.arange(batch.rows), batch.row_Q[clipped_Q])] -= 3.0  # a ratio of 20, and A > 0
    batch = replace(batch, sequence_advantage_Q=advantage_Q, logprobs_RS=logprobs_RS)
    config = TrainConfig(loss="ppo", minibatches=3, learning_rate=1e-6, max_mismatch=None)
    metrics = train_step(trainer, batch, config, None, SILENT)
    assert trainer.optimizer.count == 1
    assert metrics["updates_skipped"] == 2.0
    assert metrics["no_signal"] == 0.0


def test_epochs_divide_by_the_policy_before_the_step(model, random):
    """Three epochs with the server's log-probabilities are three steps on the same batch, bit for bit. With the trainer's own, later
    epochs keep those of the first, so that the ratio leaves 1."""
    from lockstep.engine.steps.train_step import train_step

    once = TrainConfig(loss="ppo", learning_rate=1e-2, minibatches=2, max_mismatch=None)
    three = once.model_copy(update={"epochs": 3})
    together, parts = opened(model, "float32"), opened(model, "float32")
    batch = on_policy(together, random, minibatches=2)
    metrics = train_step(together, batch, three, None, SILENT)
    singles = [train_step(parts, batch, once, None, SILENT) for _ in range(3)]
    assert unchanged(together, state(parts))
    assert together.optimizer.count == 6
    assert metrics["tokens_scored"] == singles[0]["tokens_scored"]
    assert metrics["mismatch"] == singles[0]["mismatch"]  # of the weights before the first update
    own = {"old_logprobs": "trainer", "minibatches": 1}
    single = on_policy(together, random)
    assert train_step(together, single, once.model_copy(update=own), None, SILENT)["ratio_max"] == pytest.approx(
        1, abs=1e-5
    )
    again = train_step(together, single, once.model_copy(update=own | {"epochs": 2}), None, SILENT)
    assert again["ratio_max"] > 1.001


def test_sums_over_minibatches_are_sums_and_maxima_maxima(model, random):
    """With a step too small to matter, the metrics of four updates are those of one."""
    from lockstep.engine.steps.train_step import train_step

    trainer = opened(model, "float32")
    batch = on_policy(trainer, random, noise=0.3, minibatches=4)
    names = ("tokens_scored", "ratio_max", "ratio_mean", "clip_fraction", "entropy", "mismatch", "mismatch_max", "kl")
    totals = {}
    for count in (4, 1):
        config = TrainConfig(loss="ppo", minibatches=count, learning_rate=1e-12, max_mismatch=None)
        metrics = train_step(trainer, batch, config, None, SILENT)
        totals[count] = {name: metrics[name] for name in (*names, "ess", "loss")}
    assert totals[4] == pytest.approx(totals[1], rel=1e-5)
