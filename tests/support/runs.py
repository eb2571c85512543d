"""A run's folder as a training run leaves it, with metrics and rollouts that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.batching.prepare import prepare
from lockstep.batching.token_table import TokenTable
from lockstep.config.train import TrainConfig
from lockstep.rollouts.parquet import write_parquet
from lockstep.rollouts.trajectory import TrajectoryGroup
from lockstep.runs.store import RunStore

HEALTHY = {
    "groups": 8.0,
    "trajectories": 64.0,
    "trajectories_dropped_stale": 0.0,
    "seconds_train": 2.0,
    "seconds_rollout": 3.0,
    "replies_truncated": 0.02,
}


def healthy_metrics(steps: int, random: np.random.Generator) -> dict[int, dict[str, float]]:
    """A run that learns: the reward rises, the entropy falls with it, and all else stays as noisy as runs are."""
    made = {}
    for step in range(1, steps + 1):
        done = step / steps
        made[step] = HEALTHY | {
            "loss": random.normal(0, 0.05),
            "reward": 0.3 + 0.5 * done + random.normal(0, 0.02),
            "reward_std": 0.3 + random.normal(0, 0.02),
            "groups_without_signal": float(random.integers(0, 3)),
            "reply_tokens_mean": 80 + 20 * done + random.normal(0, 3),
            "entropy": 0.8 - 0.5 * done + random.normal(0, 0.02),
            "mismatch": 0.02 + random.normal(0, 0.001),
        }
    return made


@dataclass
class MadeRun:
    path: Path
    groups: Mapping[int, Sequence[TrajectoryGroup]]
    logprobs_RS: Mapping[int, np.ndarray]


def make_run(
    folder: Path,
    base_model: str,
    metrics: Mapping[int, Mapping[str, float]],
    groups: Mapping[int, Sequence[TrajectoryGroup]],
    random: np.random.Generator,
) -> MadeRun:
    """Publishes a step for each entry of `metrics`, with the rollouts of `groups` and what the trainer made of them."""
    store = RunStore(folder, "demo", "run")
    store.claim(
        {"backend": "megatron", "base_model": base_model, "lora": {"rank": 8}, "family": "qwen3", "dtype": "float32"}
    )
    store.keep_settings({"base_model": base_model, "server_args": []})
    trainer = {}
    try:
        for step in range(max(metrics) + 1):
            staged = store.stage(step)
            (staged / "adapter").mkdir()
            (staged / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
            store.publish(step, staged, metrics.get(step, {}))
        for step, rollouts in groups.items():
            write_parquet(store.path / "trajectories" / "train" / f"{step:04d}.parquet", rollouts, step)
            prepared = prepare(rollouts, model_name="m", step=step - 1, config=TrainConfig())
            noise_RS = random.normal(0, 0.01, prepared.batch.logprobs_RS.shape).astype(np.float32)
            trainer[step] = prepared.batch.logprobs_RS + noise_RS
            TokenTable.of(prepared.batch, prepared.packed).write(
                store.path / "tokens" / f"{step:04d}.parquet", trainer[step]
            )
    finally:
        store.close()
    return MadeRun(store.path, groups, trainer)
