"""Our optimizer against torch's, over several steps with clipping, and its state file against the safetensors library."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lockstep.config.megatron import Parallel
from lockstep.errors import StoreError

pytestmark = pytest.mark.usefixtures("groups")


def trainables(parameters: list[nn.Parameter]):
    from lockstep.engine.optim.trainable import Trainable
    from lockstep.models.contract import Piece

    return [
        Trainable(f"p{i}.weight", p, (Piece(f"hf{i}", 0, p.shape[0]),), "replicated", {f"hf{i}": tuple(p.shape)})
        for i, p in enumerate(parameters)
    ]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clip=st.sampled_from([None, 0.05, 1.0, 100.0]),
    decay=st.sampled_from([0.0, 0.1]),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=5),
)
def test_adamw(seed: int, clip: float | None, decay: float, shapes: list[tuple[int, int]]) -> None:
    from lockstep.config.megatron import Parallel
    from lockstep.engine.optim.optimizer import Optimizer, OptimizerStep

    torch.manual_seed(seed)
    ours = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Optimizer(trainables(ours), Parallel(), tied=False)
    reference = torch.optim.AdamW(theirs, lr=0.03, betas=(0.8, 0.95), eps=1e-7, weight_decay=decay)
    for _ in range(5):
        slopes = [torch.randn_like(p) for p in ours]
        for _half in range(2):  # two micro-batches add up
            sum((p.sin() * s).sum() / 2 for p, s in zip(ours, slopes, strict=True)).backward()  # pyright: ignore
        norm = optimizer.reduce()
        optimizer.step(OptimizerStep(0.03, (0.8, 0.95), 1e-7, decay, clip), norm)
        reference.zero_grad()
        sum((p.sin() * s).sum() for p, s in zip(theirs, slopes, strict=True)).backward()  # pyright: ignore
        expected = torch.nn.utils.clip_grad_norm_(theirs, clip if clip is not None else 1e30)
        assert norm == pytest.approx(float(expected), rel=1e-12)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)


def test_masters_keep_what_bf16_would_lose() -> None:
    """1,000 updates far below bf16's resolution add up."""
    from lockstep.config.megatron import Parallel
    from lockstep.engine.optim.optimizer import Optimizer, OptimizerStep

    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer(trainables([weight]), Parallel(), tied=False)
    for _ in range(1000):
        weight.sum().backward()
        optimizer.step(OptimizerStep(1e-4, max_norm=None, kind="sgd"), optimizer.reduce())
    assert weight.detach().float().tolist() == pytest.approx([0.9] * 4, abs=0.003)


def test_gradient_that_is_not_finite_is_named_and_changes_nothing() -> None:
    from lockstep.config.megatron import Parallel
    from lockstep.engine.optim.optimizer import Optimizer
    from lockstep.errors import TrainerError

    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Optimizer(trainables([good, bad]), Parallel(), tied=False)
    (good.sum() + (bad * float("nan")).sum()).backward()
    with pytest.raises(TrainerError, match="p1"):
        optimizer.reduce()
    assert good.tolist() == bad.tolist() == [1.0] * 3


def test_state_file_is_plain_safetensors(tmp_path: Path) -> None:
    from lockstep.config.megatron import Parallel
    from lockstep.engine.optim.optimizer import Optimizer, OptimizerStep
    from lockstep.engine.optim.state import read_state, write_state
    from lockstep.errors import WeightsError

    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(3))]
    optimizer = Optimizer(trainables(parameters), Parallel(), tied=False)
    (parameters[0].square().sum() + parameters[1].sum()).backward()
    optimizer.step(OptimizerStep(0.1), optimizer.reduce())
    write_state(optimizer, tmp_path, {"hf0": (5, 7), "hf1": (3,)})
    tensors = load_file(tmp_path / "optimizer.safetensors")
    assert set(tensors) == {f"{kind}/{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name in ("hf0", "hf1")}
    assert torch.equal(tensors["master/hf0"], parameters[0].detach())
    assert tensors["exp_avg_sq/hf1"].shape == (3,)
    with torch.no_grad():
        parameters[0].zero_()
    read_state(optimizer, tmp_path)
    assert torch.equal(tensors["master/hf0"], parameters[0].detach())
    other = Optimizer(trainables([nn.Parameter(torch.zeros(5, 8))]), Parallel(), tied=False)
    with pytest.raises(WeightsError, match=r"hf0.*\[5, 7\].*\[5, 8\]"):
        read_state(other, tmp_path)


def matrices(name: str) -> bool:
    """What decays, by Hugging Face name: the weights of linear layers, routers and experts, and an LM head of its own."""
    kept = ("norm.weight", "bias", "A_log", "conv1d.weight", "embed_tokens.weight")
    return not name.endswith(kept)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "llama3"])
def test_a10_weight_decay_leaves_norms_biases_and_embeddings_alone(family: str, tmp_path: Path) -> None:
    """One step without a gradient, all weights trained: matrices shrink by lr x decay, everything else keeps every bit."""
    from lockstep.config.megatron import Parallel
    from lockstep.engine.optim.optimizer import OptimizerStep
    from lockstep.engine.optim.state import write_state
    from lockstep.engine.state import open_trainer
    from lockstep.models.tiny.write import write_tiny
    from lockstep.trainer.protocol import EngineConfig

    overrides = {"num_hidden_layers": 4 if "3_5" in family else 2, "hidden_size": 32}
    model = write_tiny(family, tmp_path / "model", overrides=overrides)
    trainer = open_trainer(EngineConfig(str(model), Parallel(), dtype="bfloat16"))
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    write_state(trainer.optimizer, tmp_path / "before", trainer.shapes)
    trainer.optimizer.step(OptimizerStep(1e-2, weight_decay=0.1), 0.0)
    write_state(trainer.optimizer, tmp_path / "after", trainer.shapes)
    before, after = (load_file(tmp_path / name / "optimizer.safetensors") for name in ("before", "after"))
    names = [name for name in before if name.startswith("master/")]
    kinds = {matrices(name) for name in names}
    assert kinds == {True, False}
    for name in names:
        expected = before[name] * (1 - 1e-3) if matrices(name) else before[name]
        torch.testing.assert_close(after[name], expected, rtol=1e-6 if matrices(name) else 0, atol=0)


def test_a10_a_tied_head_on_another_stage_is_an_embedding() -> None:
    from lockstep.engine.optim.weight_decay import decays

    assert not decays("output_layer.weight", tied=True)
    assert decays("output_layer.weight", tied=False)
    assert decays("decoder.layers.0.self_attention.linear_qkv.adapter.lora_A.q_proj", tied=True)


def test_h4_a_full_disk_is_named_before_anything_is_written(tmp_path: Path) -> None:
    """The file was sparse once, and a rank that wrote into its memory map died by SIGBUS. A limit of file sizes stands for the disk."""
    from lockstep.engine.optim.optimizer import Optimizer
    from lockstep.engine.optim.state import FILE, write_state

    optimizer = Optimizer(trainables([nn.Parameter(torch.zeros(512, 512))]), Parallel(), tied=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StoreError, match=rf"{FILE} needs 3145728 bytes: File too large; make room there"):
            write_state(optimizer, tmp_path, {"hf0": (512, 512)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    write_state(optimizer, tmp_path, {"hf0": (512, 512)})
    file = tmp_path / FILE
    assert file.stat().st_blocks * 512 >= file.stat().st_size  # reserved, not sparse
