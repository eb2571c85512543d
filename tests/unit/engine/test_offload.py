"""The trainer's memory to the host and back: nothing is lost, nothing grows, and the next step does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases import tiny
from lockstep.validate.reference.batches import batch_of, tree_sequences

pytestmark = pytest.mark.usefixtures("groups")
CYCLES = 50


def opened(family: str, folder: Path, lora: bool) -> Any:
    from lockstep.config.megatron import Parallel
    from lockstep.engine.state import open_trainer
    from lockstep.trainer.protocol import EngineConfig, LoraSettings

    targets = LoraSettings(8, 16, ("q_proj", "o_proj", *(["experts"] if "moe" in family else []))) if lora else None
    model = str(tiny(family, folder, seed=int(np.random.default_rng().integers(1000))))
    return open_trainer(EngineConfig(model, Parallel(), lora=targets, dtype="bfloat16" if lora else "float32"))


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor that a step reads or writes."""
    tensors = dict(trainer.model.named_parameters()) | dict(trainer.model.named_buffers())
    for number, bucket in enumerate(trainer.optimizer.buckets):
        tensors |= {
            f"{number}/{kind}": getattr(bucket, kind) for kind in ("weights", "master", "exp_avg", "exp_avg_sq")
        }
        tensors[f"{number}/gradients"] = bucket.gradients
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def stepped(trainer: Any, batch: Any, folder: Path) -> dict[str, bytes]:
    """One optimizer step; the bytes of what it leaves on disk."""
    from lockstep.config.train import TrainConfig
    from lockstep.engine.state import save_step
    from lockstep.engine.steps.train_step import train_step

    config = TrainConfig(learning_rate=1e-2, max_mismatch=None)
    train_step(trainer, batch, config, None, lambda event: None)
    save_step(trainer, folder)
    return files_of(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("family", "lora"), [("qwen3", False), ("qwen3_moe", True)])
def test_fifty_cycles_lose_and_keep_nothing(family: str, lora: bool, tmp_path: Path) -> None:
    from lockstep.engine.memory.offload import Offload
    from lockstep.engine.state import load_step, save_step
    from lockstep.engine.steps.score import score

    rng = np.random.default_rng()
    trainer = opened(family, tmp_path / "model", lora)
    batch = batch_of(tree_sequences(rng), rng)
    published = stepped(trainer, batch, tmp_path / "s1")
    offload = Offload(trainer)
    before, memory = everything(trainer), offload.memory()
    scores_RS = score(trainer, batch, lambda event: None)
    # Nothing that a step uses is left out, and nothing is counted twice.
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(trainer)}
    assert memory["device_storages"] == sum(sizes.values()) > 0
    for cycle in range(CYCLES):
        freed = offload.out(keep_weights=True)
        assert offload.state == "weights"
        if cycle == 0:
            np.testing.assert_array_equal(score(trainer, batch, lambda event: None), scores_RS)
            save_step(trainer, tmp_path / "s1-without-optimizer", offload.on_host)
        freed += offload.out(keep_weights=False)
        assert offload.state == "away"
        if cycle == 0:
            save_step(trainer, tmp_path / "s1-away", offload.on_host)
        assert offload.memory()["device_storages"] == 0
        assert all(t.untyped_storage().nbytes() == 0 for t in _tensors(trainer))
        assert offload.out(keep_weights=False) == 0
        assert offload.back() == freed == memory["device_storages"]
        assert offload.state == "here"
        if cycle == 0:
            save_step(trainer, tmp_path / "s1-back", offload.on_host)
        copies = offload.memory()["host_copies"]
        assert copies == memory["device_storages"] - _gradient_bytes(trainer)
    after = everything(trainer)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for folder in ("s1-without-optimizer", "s1-away", "s1-back"):
        assert files_of(tmp_path / folder) == published, folder
    with_cycles = stepped(trainer, batch, tmp_path / "s2")
    trained = everything(trainer)
    offload.out(keep_weights=False)
    offload.back()
    assert all(torch.equal(tensor, everything(trainer)[name]) for name, tensor in trained.items())
    load_step(trainer, tmp_path / "s1")
    assert stepped(trainer, batch, tmp_path / "s2-without") == with_cycles


def _tensors(trainer: Any) -> list[torch.Tensor]:
    kinds = ("weights", "gradients", "master", "exp_avg", "exp_avg_sq")
    flat = [getattr(bucket, kind) for bucket in trainer.optimizer.buckets for kind in kinds]
    return [*trainer.model.parameters(), *trainer.model.buffers(), *flat]


def _gradient_bytes(trainer: Any) -> int:
    return sum(bucket.gradients.untyped_storage().nbytes() for bucket in trainer.optimizer.buckets)


def test_no_room_on_the_host_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.engine.memory import offload
    from lockstep.errors import TrainerError

    trainer = opened("qwen3", tmp_path / "model", lora=True)
    moved, before = offload.Offload(trainer), everything(trainer)
    monkeypatch.setattr(offload, "host_free", lambda: 1000)
    with pytest.raises(TrainerError, match="no room on this host"):
        moved.out(keep_weights=False)
    assert moved.state == "here"
    assert all(torch.equal(t, before[name]) for name, t in everything(trainer).items())
