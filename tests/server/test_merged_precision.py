"""A model whose checkpoint keeps some tensors in fp32 beside bf16 matrices, with the real server: all weights trained, synced, served."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

import lockstep as ls
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.cli.quickstart.examples import examples_folder
from lockstep.loop.run_file import load_run_file
from lockstep.loop.task import load_task
from lockstep.models.tiny.write import write_tiny
from lockstep.rollouts.gather import gather_trajectory_groups

pytestmark = [pytest.mark.server, pytest.mark.slow]


async def test_a9_mixed_dtypes_reach_the_server(tmp_path) -> None:
    """Two steps: the server takes fp32 and bf16 tensors in one sync, and the probe after each finds the trainer's policy."""
    task = load_task(examples_folder() / "yes_no_maybe" / "task.py")
    section = load_run_file(examples_folder() / "yes_no_maybe" / "config.toml").task
    base = write_tiny("qwen3_5", tmp_path / "model", seed=random.randrange(1000))
    model = ls.TrainableModel(name="m", project="p", base_model=str(base), lora=None)
    backend = MegatronBackend(path=tmp_path / "runs", rollout_weights_mode="merged", max_model_len=256)
    await model.register(backend)
    try:
        for _ in range(2):
            scenarios = task.draw(2, section.seed, model.step)
            groups = await gather_trajectory_groups(
                [[task.rollout(model, scenario, 1.0) for _ in range(4)] for scenario in scenarios], progress=False
            )
            for group in groups:
                for number, trajectory in enumerate(group.trajectories):
                    trajectory.reward = float(number)  # there is something to learn, whatever a random model says
            result = await backend.train(model, groups, ls.TrainConfig(learning_rate=1e-4))
            assert result.metrics["no_signal"] == 0.0
            assert result.metrics["mismatch"] < 0.06
    finally:
        await backend.close()
    before = load_file(base / "model.safetensors")
    after = load_file(result.checkpoint_path / "model" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    kept = [name for name, tensor in before.items() if tensor.dtype == torch.float32]
    assert kept
    assert all(not torch.equal(after[name], before[name]) for name in kept)
