"""Every advantage and loss teaches: one-token replies sampled from the real engine on a tiny model, until the reward rises.

Shapes: V vocabulary, Q sequences.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.batching.advantages import advantages
from lockstep.batching.pack import pack
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.config.megatron import Parallel
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError

pytestmark = pytest.mark.usefixtures("groups")

PROMPTS = ([5, 6, 7], [9, 3, 8])
SAMPLES = 16
SILENT = lambda event: None  # noqa: E731


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def trainer(folder: Path) -> Any:
    from packing import open_tiny

    trainer = open_tiny("qwen3", folder, "float32", True, Parallel())
    for bucket in trainer.optimizer.buckets:  # it gave the adapter values behind the optimizer's back
        bucket.master.copy_(bucket.weights[bucket.low : bucket.high])
    return trainer


def reply(prompt: list[int], token: int, logprob: float) -> TokenSequence:
    tokens = np.array([*prompt, token], dtype=np.int32)
    logprobs = np.array([np.nan] * len(prompt) + [logprob], dtype=np.float32)
    return TokenSequence(f"{token}", tokens, np.isfinite(logprobs), logprobs, np.ones(len(tokens), dtype=np.float32))


def good(tokens: np.ndarray) -> np.ndarray:
    """A quarter of all tokens earn the reward."""
    return tokens % 4 == 0


def distributions(trainer: Any) -> list[np.ndarray]:
    """float64 `[V]` for each prompt: what the engine gives each token as the reply."""
    from lockstep.engine.steps.score import score

    vocabulary = trainer.config.vocab_size
    every = [reply(prompt, token, -1.0) for prompt in PROMPTS for token in range(vocabulary)]
    batch = pack(every, np.ones(len(every)), np.ones(len(every)))
    scores_RS = score(trainer, batch, SILENT)
    index_Q = batch.scored_index_P[batch.scored_offsets_Q[:-1]]
    values_Q = scores_RS[batch.row_Q, index_Q].astype(np.float64)
    return [
        np.exp(part) / np.exp(part).sum() for part in np.split(values_Q, len(PROMPTS))
    ]  # the sum is 1 to fp32's rounding


def success(trainer: Any) -> float:
    return float(np.mean([p_V[good(np.arange(len(p_V)))].sum() for p_V in distributions(trainer)]))


def entropy(p_V: np.ndarray) -> float:
    return float(-(p_V * np.log(p_V)).sum())


def step(
    trainer: Any, random: np.random.Generator, config: TrainConfig, reference: Path | None = None, reward: float = 1.0
) -> dict[str, float]:
    """One step on replies that the engine itself would sample."""
    from lockstep.engine.steps.train_step import train_step

    replies, rewards = [], []
    for prompt, p_V in zip(PROMPTS, distributions(trainer), strict=True):
        drawn = random.choice(len(p_V), SAMPLES, p=p_V)
        replies += [reply(prompt, int(token), float(np.log(p_V[token]))) for token in drawn]
        rewards.append((reward * good(drawn)).tolist())
    advantage_Q = advantages(rewards, config.policy_advantage)
    batch = pack(replies, advantage_Q, np.ones(len(replies)), minibatches=config.minibatches)
    if config.constant_length is not None:
        batch = replace(batch, divisor=np.array([float(len(replies) * config.constant_length)]))
    return train_step(trainer, batch, config, reference, SILENT)


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": "maxrl", "loss": "ppo"},
        {"advantage": "rloo", "loss": "reinforce"},
        {"advantage": "dr_grpo", "loss": "ppo", "token_normalization": "constant", "constant_length": 8},
        {"advantage": "reinforce_pp", "loss": "sapo"},
        {"advantage": "reinforce_pp_baseline", "loss": "gmpo"},
        {"advantage": "batch_std", "loss": "cispo", "minibatches": 2},
        {"loss": "ppo", "old_logprobs": "trainer", "importance_correction": "rejected", "importance_level": "sequence"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_the_reward_rises(trainer, settings):
    random = np.random.default_rng(1)
    before = success(trainer)
    for _ in range(12):
        step(trainer, random, TrainConfig(learning_rate=1e-2, **settings))
    assert before < 0.4
    assert success(trainer) > 0.9


def test_an_entropy_bonus_alone_flattens_the_policy(trainer):
    random = np.random.default_rng(1)
    before = [entropy(p_V) for p_V in distributions(trainer)]
    for _ in range(12):
        assert step(trainer, random, TrainConfig(learning_rate=1e-2, entropy_coef=1.0), reward=0.0)["no_signal"] == 0
    after = [entropy(p_V) for p_V in distributions(trainer)]
    assert np.mean(after) - np.mean(before) > 0.5 * (np.log(trainer.config.vocab_size) - np.mean(before))


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_estimator": "k1", "kl_in": "reward"},
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"kl_estimator": "k3", "kl_corrected": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_kl_penalty_pulls_back_to_its_reference(trainer, tmp_path, settings):
    """A policy that was led away comes back when rewards are equal."""
    from lockstep.engine.state import save_step

    random = np.random.default_rng(1)
    save_step(trainer, tmp_path / "step")
    reference = distributions(trainer)

    def distance() -> float:
        pairs = zip(distributions(trainer), reference, strict=True)
        return float(np.mean([(p_V * np.log(p_V / q_V)).sum() for p_V, q_V in pairs]))

    for _ in range(4):
        step(trainer, random, TrainConfig(learning_rate=1e-2, loss="reinforce"))
    away = distance()
    for _ in range(12):
        config = TrainConfig(learning_rate=5e-3, loss="reinforce", kl_coef=1.0, **settings)
        step(trainer, random, config, tmp_path / "step", reward=0.0)
    assert away > 0.3
    assert distance() < away / 2


def test_a_student_learns_its_teacher_from_its_own_samples(folder, tmp_path):
    """On-policy distillation: without any reward, KL(student || teacher) falls by 90% within 100 steps."""
    from lockstep.engine.state import save_step
    from packing import open_tiny

    teacher, student = (open_tiny("qwen3", folder, "float32", True, Parallel()) for _ in range(2))
    taught = {name: np_tensor(shape, number) for number, (name, shape) in enumerate(sorted(teacher.shapes.items()))}
    teacher.optimizer.assign_masters(taught)
    save_step(teacher, tmp_path / "teacher")
    goal = distributions(teacher)
    student.optimizer.assign_masters({name: tensor * ("lora_A" in name) for name, tensor in taught.items()})

    def distance() -> float:
        return float(np.mean([(p * np.log(p / q)).sum() for p, q in zip(distributions(student), goal, strict=True)]))

    random, before = np.random.default_rng(1), distance()
    config = TrainConfig(
        learning_rate=1e-2,
        lr_schedule="linear",
        schedule_steps=100,
        loss="reinforce",
        kl_coef=1.0,
        kl_estimator="k1",
        kl_in="reward",
    )
    for number in range(1, 101):
        step(student, random, config.at_step(number), tmp_path / "teacher", reward=0.0)
    assert before > 0.1
    assert distance() < 0.1 * before
    lora = student.settings.lora
    assert lora is not None
    student.settings = replace(student.settings, lora=replace(lora, alpha=3.0))
    with pytest.raises(ConfigError, match=r"the KL reference .*adapter is an adapter of .*alpha=16.0"):
        step(student, random, config, tmp_path / "teacher", reward=0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_to_start_from(folder, tmp_path, dtype):
    """Step 0 computes what the adapter's run did, with its values in full precision; and only that adapter is taken."""
    from lockstep.engine.state import save_step, start_from
    from lockstep.models.checkpoint.peft import read_adapter
    from packing import open_tiny

    taught = open_tiny("qwen3", folder, "float32", True, Parallel())
    taught.optimizer.assign_masters(
        {name: np_tensor(shape, number) for number, (name, shape) in enumerate(sorted(taught.shapes.items()))}
    )
    save_step(taught, tmp_path / "first")
    begun = open_tiny("qwen3", folder, dtype, True, Parallel())
    start_from(begun, tmp_path / "first" / "adapter")
    for ours, theirs in zip(begun.optimizer.buckets, taught.optimizer.buckets, strict=True):
        assert ours.master.equal(theirs.master)
        assert not ours.exp_avg.any()
    if dtype == "float32":
        np.testing.assert_array_equal(distributions(begun), distributions(taught))
    save_step(begun, tmp_path / "second")
    again, _ = read_adapter(tmp_path / "second" / "adapter", begun.sites, begun.config, begun.checkpoint.layout)
    assert any(tensor.any() for name, tensor in again.items() if name.endswith("lora_B"))
    lora = begun.settings.lora
    assert lora is not None
    begun.settings = replace(begun.settings, lora=replace(lora, alpha=3.0))
    with pytest.raises(ConfigError, match=r"lora: .*adapter is an adapter of .*alpha=16.0.* the run's is .*alpha=3.0"):
        start_from(begun, tmp_path / "first" / "adapter")


def np_tensor(shape: tuple[int, ...], seed: int) -> Any:
    import torch

    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.1)
