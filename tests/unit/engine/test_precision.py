"""Tensors that a checkpoint keeps in fp32 beside bf16 matrices: from the file to the trainer, to the server and back to a file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cases import tiny
from lockstep.validate.reference.batches import batch_of, tree_sequences

pytestmark = pytest.mark.usefixtures("groups")
KEPT = ("linear_attn.A_log", "linear_attn.norm.weight")


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a9_fp32_tensors_keep_their_precision(family: str, tmp_path: Path) -> None:
    """Loaded, saved and sent to the bit; trained by less than bf16 could hold; exported as they are computed with."""
    from lockstep.config.megatron import Parallel
    from lockstep.config.train import TrainConfig
    from lockstep.engine.export.merged_weights import WeightsOut
    from lockstep.engine.state import open_trainer, save_step
    from lockstep.engine.steps.train_step import train_step
    from lockstep.engine.weight_sync.sender_group import SingleSender
    from lockstep.trainer.protocol import EngineConfig

    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    model = tiny(family, tmp_path / "model", seed=int(rng.integers(1000)), num_hidden_layers=4)
    stored = load_file(model / "model.safetensors")
    wide = {name: tensor for name, tensor in stored.items() if name.endswith(KEPT)}
    assert wide
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert {tensor.dtype for name, tensor in stored.items() if name not in wide} == {torch.bfloat16}
    assert all((tensor.bfloat16().float() != tensor).any() for tensor in wide.values())

    trainer = open_trainer(EngineConfig(str(model), Parallel(), dtype="bfloat16"))
    save_step(trainer, tmp_path / "s0")
    assert (tmp_path / "s0" / "model" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()

    out = WeightsOut(trainer, SingleSender())
    metas = {slot.meta.name: slot.meta for plan in out.plan.senders for slot in plan.slots()}
    for name, tensor in stored.items():
        assert metas[name].dtype == tensor.dtype, name
    sent = dict(out.tensors())
    for name, tensor in wide.items():
        key = name.replace("model.layers.", "decoder.layers.").replace("linear_attn", "self_attention")
        torch.testing.assert_close(sent[key].view_as(tensor), tensor, rtol=0, atol=0)

    batch = batch_of(tree_sequences(rng), rng)
    train_step(trainer, batch, TrainConfig(learning_rate=1e-5, max_mismatch=None), None, lambda event: None)
    save_step(trainer, tmp_path / "s1")
    after = load_file(tmp_path / "s1" / "model" / "model.safetensors")
    for name, tensor in wide.items():
        moved = (after[name] - tensor).abs()
        assert 0 < float(moved.max()) < 2e-5, name
        key = name.replace("model.layers.", "decoder.layers.").replace("linear_attn", "self_attention")
        used = trainer.model.get_parameter(key).detach()
        torch.testing.assert_close(used.view_as(tensor), after[name], rtol=0, atol=0)


def test_a9_a_checkpoint_in_fp32_is_rounded_where_bf16_is_asked_for(tmp_path: Path) -> None:
    """Nothing is kept on purpose there: all parameters compute in the dtype that was set."""
    from lockstep.config.megatron import Parallel
    from lockstep.engine.state import open_trainer
    from lockstep.trainer.protocol import EngineConfig

    model = tiny("qwen3_5", tmp_path / "model", num_hidden_layers=4, dtype="float32")
    trainer = open_trainer(EngineConfig(str(model), Parallel(), dtype="bfloat16"))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
