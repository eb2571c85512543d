"""The trainer's memory to the host and back: nothing is lost, nothing grows, and the next step does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import batch_of, tiny, tree_sequences

pytestmark = pytest.mark.usefixtures("groups")
CYCLES = 50


def opened(family: str, folder: Path, lora: bool) -> Any:
    from lockstep.config.megatron import Parallel
    from lockstep.engine.state import open_session
    from lockstep.trainer.protocol import EngineConfig, LoraSettings

    targets = LoraSettings(8, 16, ("q_proj", "o_proj", *(["experts"] if "moe" in family else []))) if lora else None
    model = str(tiny(family, folder, seed=int(np.random.default_rng().integers(1000))))
    return open_session(EngineConfig(model, Parallel(), lora=targets, dtype="bfloat16" if lora else "float32"))


def everything(session: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor that a step reads or writes."""
    found = dict(session.model.named_parameters()) | dict(session.model.named_buffers())
    for number, bucket in enumerate(session.optimizer.buckets):
        found |= {f"{number}/{kind}": getattr(bucket, kind) for kind in ("weights", "master", "exp_avg", "exp_avg_sq")}
        found[f"{number}/gradients"] = bucket.gradients
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def stepped(session: Any, batch: Any, folder: Path) -> dict[str, bytes]:
    """One optimizer step; the bytes of what it leaves on disk."""
    from lockstep.config.train import TrainConfig
    from lockstep.engine.state import save_step
    from lockstep.engine.train_step import train_step

    config = TrainConfig(learning_rate=1e-2, max_mismatch=None)
    train_step(session, batch, config, None, lambda event: None)
    save_step(session, folder)
    return files_of(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("family", "lora"), [("qwen3", False), ("qwen3_moe", True)])
def test_fifty_cycles_lose_and_keep_nothing(family: str, lora: bool, tmp_path: Path) -> None:
    from lockstep.engine.memory.offload import Offload
    from lockstep.engine.state import load_step, save_step
    from lockstep.engine.train_step import score

    rng = np.random.default_rng()
    session = opened(family, tmp_path / "model", lora)
    batch = batch_of(tree_sequences(rng), rng)
    published = stepped(session, batch, tmp_path / "s1")
    offload = Offload(session)
    before, memory = everything(session), offload.memory()
    scores_RS = score(session, batch, lambda event: None)
    # Nothing that a step uses is left out, and nothing is counted twice.
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(session)}
    assert memory["device_storages"] == sum(held.values()) > 0
    for cycle in range(CYCLES):
        freed = offload.out(keep_weights=True)
        assert offload.state == "weights"
        if cycle == 0:
            np.testing.assert_array_equal(score(session, batch, lambda event: None), scores_RS)
            save_step(session, tmp_path / "s1-without-optimizer", offload.on_host)
        freed += offload.out(keep_weights=False)
        assert offload.state == "away"
        if cycle == 0:
            save_step(session, tmp_path / "s1-away", offload.on_host)
        assert offload.memory()["device_storages"] == 0
        assert all(t.untyped_storage().nbytes() == 0 for t in _tensors(session))
        assert offload.out(keep_weights=False) == 0
        assert offload.back() == freed == memory["device_storages"]
        assert offload.state == "here"
        if cycle == 0:
            save_step(session, tmp_path / "s1-back", offload.on_host)
        copies = offload.memory()["host_copies"]
        assert copies == memory["device_storages"] - _gradient_bytes(session)
    after = everything(session)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for folder in ("s1-without-optimizer", "s1-away", "s1-back"):
        assert files_of(tmp_path / folder) == published, folder
    with_cycles = stepped(session, batch, tmp_path / "s2")
    trained = everything(session)
    offload.out(keep_weights=False)
    offload.back()
    assert all(torch.equal(tensor, everything(session)[name]) for name, tensor in trained.items())
    load_step(session, tmp_path / "s1")
    assert stepped(session, batch, tmp_path / "s2-without") == with_cycles


def _tensors(session: Any) -> list[torch.Tensor]:
    kinds = ("weights", "gradients", "master", "exp_avg", "exp_avg_sq")
    flat = [getattr(bucket, kind) for bucket in session.optimizer.buckets for kind in kinds]
    return [*session.model.parameters(), *session.model.buffers(), *flat]


def _gradient_bytes(session: Any) -> int:
    return sum(bucket.gradients.untyped_storage().nbytes() for bucket in session.optimizer.buckets)


def test_no_room_on_the_host_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.engine.memory import offload
    from lockstep.errors import TrainerError

    session = opened("qwen3", tmp_path / "model", lora=True)
    moved, before = offload.Offload(session), everything(session)
    monkeypatch.setattr(offload, "host_free", lambda: 1000)
    with pytest.raises(TrainerError, match="no room on this host"):
        moved.out(keep_weights=False)
    assert moved.state == "here"
    assert all(torch.equal(t, before[name]) for name, t in everything(session).items())
