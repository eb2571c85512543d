"""An adapter written by us changes what PEFT computes exactly as merging it into the weights does, for every family and
layout.

Shape suffixes: O output rows, I input columns, R LoRA rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import ALPHA, RANK, Model, hugging_face, random_adapter, released
from checkpoints import release
from lockstep.config.lora import LoraConfig
from lockstep.errors import WeightsError
from lockstep.models.checkpoint.peft import identity_adapter, read_adapter
from lockstep.models.targets import lora_sites
from lockstep.models.tiny.write import write_tiny

KEYS = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "llama3")


def logits(model: torch.nn.Module, seed: int) -> torch.Tensor:
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("key", KEYS)
def test_peft_computes_what_merging_gives(key: str, tmp_path: Path) -> None:
    model = Model(write_tiny(key, tmp_path / "base", seed=5, overrides={"dtype": "float32", "num_hidden_layers": 4}))
    adapter = random_adapter(model.sites, 11)
    folder = model.write(tmp_path / "adapter", adapter, model.targets)
    wrapped = peft.PeftModel.from_pretrained(hugging_face(model.folder), str(folder))
    assert not [n for n, p in wrapped.named_parameters() if "lora_B" in n and not p.any()], (
        "PEFT left a pair at its start value"
    )
    ours, theirs = logits(hugging_face(model.merge(adapter, tmp_path / "merged")), 3), logits(wrapped, 3)
    base = logits(hugging_face(model.folder), 3)
    assert (ours - base).abs().max() > 0.3
    assert (ours - theirs).abs().max() < 2e-5 * ours.abs().max()


@pytest.mark.parametrize("key", KEYS)
def test_every_target_alone_reaches_its_weights(key: str, tmp_path: Path) -> None:
    """A file with one target loads in PEFT, and its effect is that target's."""
    model = Model(write_tiny(key, tmp_path / "base", seed=6, overrides={"dtype": "float32", "num_hidden_layers": 4}))
    base = logits(hugging_face(model.folder), 4)
    for target in model.targets:
        sites = lora_sites(model.shards, (target,))
        adapter = random_adapter(sites, 12)
        folder = model.write(tmp_path / target, adapter, (target,))
        theirs = logits(peft.PeftModel.from_pretrained(hugging_face(model.folder), str(folder)), 4)
        ours = logits(hugging_face(model.merge(adapter, tmp_path / f"merged_{target}")), 4)
        assert (ours - base).abs().max() > 1e-3, target
        assert (ours - theirs).abs().max() < 2e-5 * ours.abs().max(), target


@pytest.mark.parametrize(("key", "stacked"), [("qwen3_5", False), ("qwen3_5_moe", True), ("qwen3_5_moe", False)])
def test_released_class(key: str, stacked: bool, tmp_path: Path) -> None:
    """The multimodal class: same adapter, its own names; and merged weights keep vision tower and MTP."""
    text = write_tiny(key, tmp_path / "text", seed=7, overrides={"dtype": "float32", "num_hidden_layers": 4})
    model, plain = Model(release(text, tmp_path / "base", stacked)), Model(text)
    assert torch.equal(logits(released(model.folder), 5), logits(hugging_face(text), 5))
    adapter = random_adapter(model.sites, 15)
    folder = model.write(tmp_path / "adapter", adapter, model.targets)
    theirs = logits(peft.PeftModel.from_pretrained(released(model.folder), str(folder)), 5)
    ours = logits(released(model.merge(adapter, tmp_path / "merged")), 5)
    assert (ours - theirs).abs().max() < 2e-5 * ours.abs().max()
    assert torch.equal(ours, logits(hugging_face(plain.merge(adapter, tmp_path / "plain")), 5))
    before, after = load_file(model.folder / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    carried = [n for n in before if n.startswith(("mtp.", "model.visual."))]
    assert len(carried) > 5
    assert all(torch.equal(before[n], after[n]) for n in carried)


def test_peft_still_drops_dense_layers_of_a_moe_model(tmp_path: Path) -> None:
    """Why such layers carry no pair. When this fails, PEFT can tell the two apart: give them theirs in qwen3/contract.py."""
    model = Model(write_tiny("qwen3_moe", tmp_path / "base", overrides={"mlp_only_layers": [1]}))
    adapter = random_adapter(model.sites, 16)
    assert not any(".layers.1.mlp." in name for name in adapter)
    folder = model.write(tmp_path / "adapter", adapter, model.targets)
    ours = logits(hugging_face(model.merge(adapter, tmp_path / "merged")), 6)
    theirs = logits(peft.PeftModel.from_pretrained(hugging_face(model.folder), str(folder)), 6)
    assert (ours - theirs).abs().max() < 2e-5 * ours.abs().max()
    stored = load_file(folder / "adapter_model.safetensors")
    for side, shape in (("A", (RANK, 128)), ("B", (256, RANK))):
        stored[f"base_model.model.model.layers.1.mlp.gate_proj.lora_{side}.weight"] = torch.ones(shape)
    save_file(stored, folder / "adapter_model.safetensors")
    more = logits(peft.PeftModel.from_pretrained(hugging_face(model.folder), str(folder)), 6)
    assert torch.equal(more, theirs)


@pytest.mark.parametrize("key", KEYS)
def test_reading_returns_what_was_written(key: str, tmp_path: Path) -> None:
    model = Model(write_tiny(key, tmp_path / "base", overrides={"num_hidden_layers": 4}))
    targets = tuple(t for t in model.targets if t != "k_proj")
    adapter = random_adapter(lora_sites(model.shards, targets), 13)
    folder = model.write(tmp_path / "adapter", adapter, targets)
    tensors, info = read_adapter(folder, model.sites, model.config, model.checkpoint.layout)
    assert tensors.keys() == adapter.keys()
    assert all(torch.equal(tensors[n], adapter[n]) for n in adapter)
    assert (info.rank, info.alpha, sorted(info.targets)) == (RANK, ALPHA, sorted(targets))


def test_an_rslora_file_is_read_with_the_scale_that_peft_gives_it(tmp_path: Path) -> None:
    model = Model(write_tiny("qwen3", tmp_path / "base", overrides={"dtype": "float32"}))
    adapter = random_adapter(model.sites, 15)
    folder = model.write(tmp_path / "adapter", adapter, model.targets)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, "use_rslora": True}))
    _, info = read_adapter(folder, model.sites, model.config, model.checkpoint.layout)
    wrapped = peft.PeftModel.from_pretrained(hugging_face(model.folder), str(folder))
    scales = [m.scaling["default"] for m in wrapped.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert scales
    assert scales == pytest.approx([info.scale] * len(scales))
    assert LoraConfig(rank=16, alpha=ALPHA, rslora=True).applied_alpha == pytest.approx(ALPHA * 4)


def test_damaged_adapters_are_refused_by_name(tmp_path: Path) -> None:
    model = Model(write_tiny("qwen3_5_moe", tmp_path / "base", overrides={"num_hidden_layers": 4}))
    folder = model.write(tmp_path / "adapter", random_adapter(model.sites, 14), model.targets)
    intact = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"

    def read(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / "adapter_model.safetensors")
        read_adapter(folder, model.sites, model.config, model.checkpoint.layout)

    with pytest.raises(WeightsError, match=r"lacks model.layers.3.self_attn.q_proj.lora_B"):
        read({n: t for n, t in intact.items() if n != name})
    with pytest.raises(WeightsError, match=r"unknown model.layers.9.self_attn.q_proj.lora_B"):
        read({**intact, name.replace("layers.3", "layers.9"): intact[name].clone()})
    with pytest.raises(WeightsError, match=r"q_proj.lora_B has shape"):
        read({**intact, name: intact[name][1:]})
    with pytest.raises(WeightsError, match="is no LoRA tensor of this model"):
        read({**intact, "lm_head.weight": intact[name].clone()})
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, "use_dora": True}))
    with pytest.raises(WeightsError, match="use_dora"):
        read(intact)
    for damaged in ("{", "[1]", "{}", json.dumps({**raw, "r": "many"})):
        (folder / "adapter_config.json").write_text(damaged)
        with pytest.raises(WeightsError, match=r"adapter_config\.json is damaged"):
            read(intact)


def test_identity_adapter_changes_nothing_and_starts_like_peft(tmp_path: Path) -> None:
    model = Model(write_tiny("qwen3", tmp_path / "base"))
    adapter = identity_adapter(model.sites, 16, seed=1)
    again = identity_adapter(list(reversed(model.sites)), 16, seed=1)
    assert all(torch.equal(adapter[n], again[n]) for n in adapter)
    assert not any(t.any() for n, t in adapter.items() if n.endswith("lora_B"))
    reference = peft.get_peft_model(hugging_face(model.folder), peft.LoraConfig(r=16, target_modules=["q_proj"]))
    theirs = torch.cat([p.flatten() for n, p in reference.named_parameters() if "lora_A" in n])
    ours = torch.cat([t.flatten() for n, t in adapter.items() if n.endswith("q_proj.lora_A")])
    assert ours.std() == pytest.approx(theirs.std().item(), rel=0.05)
    assert ours.abs().max() == pytest.approx(theirs.abs().max().item(), rel=0.05)
