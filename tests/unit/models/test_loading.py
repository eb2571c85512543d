"""A checkpoint is loaded whole or refused with the tensor's name, and a rank reads no more than its part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contract import load

from checkpoints import Recipe, write_checkpoint
from lockstep.errors import WeightsError
from lockstep.models.checkpoint.export import export_checkpoint
from lockstep.models.checkpoint.load import load_shards
from lockstep.models.checkpoint.read import expected_tensors
from lockstep.models.contract import Sizes
from lockstep.validate.reference.assembled import hf_tensors

FIELDS = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 6,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(Recipe("qwen3_5", FIELDS, released=True, mtp={"mtp_num_hidden_layers": 1}), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.language_model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.1.extra.weight",
        "mtpx.fc.weight",
        "model.visuals.x",
        "model.language_model.layers.2.x",
    ],
)
def test_nothing_but_the_named_parts_is_skipped(folder: Path, name: str) -> None:
    load(folder)
    rewrite(folder, lambda t: t.update({name: torch.zeros(3)}))
    with pytest.raises(WeightsError, match=f"{name} in the checkpoint but unknown"):
        load(folder)


def test_missing_or_misshapen_tensors_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({NORM: torch.zeros(9)}))
    with pytest.raises(WeightsError, match=rf"{NORM} has shape \[9\], but config.json implies \[8\]"):
        load(folder)
    rewrite(folder, lambda t: t.pop(NORM))
    with pytest.raises(WeightsError, match=f"{NORM} missing"):
        load(folder)


def test_mixed_spellings_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.input_layernorm.weight": torch.zeros(8)}))
    with pytest.raises(WeightsError, match="under both"):
        load(folder)


def test_damaged_files_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    intact = path.read_bytes()
    for damaged, message in (
        (intact[:-5], "is not what its header says"),
        (intact[:20], "no complete safetensors file"),
        (intact[:8] + b"x" + intact[9:], "damaged header"),
        (intact.replace(b'"dtype"', b'"dtypo"', 1), "damaged header"),
        (intact.replace(b'"data_offsets":[', b'"data_offsets":{', 1), "damaged header"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=message):
            load(folder)
    path.unlink()
    with pytest.raises(WeightsError, match=r"lacks model.safetensors"):
        load(folder)


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_checkpoint(Recipe("qwen3_5", FIELDS, files=2), folder)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    name = min(raw["weight_map"])
    for damaged in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        index.write_text(damaged)
        with pytest.raises(WeightsError, match=r"index\.json is damaged"):
            load(folder)
    index.write_text(json.dumps({"weight_map": {**raw["weight_map"], "ghost": raw["weight_map"][name]}}))
    with pytest.raises(WeightsError, match="names ghost, which no file holds"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in raw["weight_map"].items() if n != name}}))
    with pytest.raises(WeightsError, match="write the index again"):
        load(folder)
    for damaged in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        index.write_text(damaged)
        with pytest.raises(WeightsError, match=r"index\.json is damaged"):
            load(folder)
    index.write_text(json.dumps({"weight_map": {**raw["weight_map"], "ghost": "absent.safetensors"}}))
    with pytest.raises(WeightsError, match=r"lacks absent.safetensors"):
        load(folder)


def test_export_is_all_or_nothing(folder: Path, tmp_path: Path) -> None:
    handler, config, checkpoint = load(folder)
    shapes = expected_tensors(handler, config, checkpoint.layout)
    shards = handler.all_shards(config, checkpoint.layout)
    state = dict(load_shards(checkpoint, shards))
    with pytest.raises(WeightsError, match="was not exported"):
        export_checkpoint(
            checkpoint, ((n, t) for n, t in hf_tensors([(shards, state)], shapes) if n != NORM), tmp_path / "out"
        )
    with pytest.raises(WeightsError, match="came twice"):
        export_checkpoint(checkpoint, [(NORM, torch.zeros(8))] * 2, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"is not in"):
        export_checkpoint(checkpoint, [("unknown", torch.zeros(8))], tmp_path / "out")
    with pytest.raises(WeightsError, match=r"can't replace"):
        export_checkpoint(checkpoint, [(NORM, torch.zeros(7))], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    half = [s for s in shards if "layers.1." not in s.megatron]
    with pytest.raises(WeightsError, match="a rank is missing"):
        list(hf_tensors([(half, state)], shapes))
    two = handler.shards(config, checkpoint.layout, Sizes(), range(2))
    with pytest.raises(WeightsError, match="already exists"):
        export_checkpoint(checkpoint, hf_tensors([(two, state)], shapes), folder)


def test_changed_weights_are_rounded_once_into_the_stored_type(tmp_path: Path) -> None:
    tied = Recipe("qwen3", {**FIELDS, "tie_word_embeddings": True}, stored_tied_head=True, dtype=torch.bfloat16)
    tensors = write_checkpoint(tied, tmp_path / "model")
    handler, config, checkpoint = load(tmp_path / "model")
    shards = handler.all_shards(config, checkpoint.layout)
    state = {n: t + 1 / 3 for n, t in load_shards(checkpoint, shards, dtype=torch.float32)}
    shapes = expected_tensors(handler, config, checkpoint.layout)
    export_checkpoint(checkpoint, hf_tensors([(shards, state)], shapes), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == tensors.keys()
    for name, before in tensors.items():
        assert torch.equal(after[name], (before.float() + 1 / 3).to(torch.bfloat16)), name


PEAK = """
import sys
from pathlib import Path
from lockstep.models.checkpoint.read import open_checkpoint
from lockstep.models.contract import Sizes
from lockstep.models.registry import get_model_support_handler, load_model_config
from lockstep.models.checkpoint.load import load_shards
def peak_kilobytes():  # of this program alone: getrusage would count what the parent held when it forked
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
folder = sys.argv[1]
handler, config = get_model_support_handler(folder), load_model_config(folder)
checkpoint = open_checkpoint(folder, handler, config)
shards = handler.shards(config, checkpoint.layout, Sizes(tp=2, tp_rank=1), range(config.layers))
next(load_shards(checkpoint, shards[:2]))
before = peak_kilobytes()
state = dict(load_shards(checkpoint, shards))
peak = peak_kilobytes() - before
held = sum(t.nbytes for t in state.values())
print(peak * 1024, held)
"""


def test_loading_holds_one_layer_beyond_the_shard(tmp_path: Path) -> None:
    fields = FIELDS | {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12, "head_dim": 64}
    fields |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000}
    tensors = write_checkpoint(Recipe("qwen3", fields), tmp_path / "model")
    layer = sum(t.nbytes for n, t in tensors.items() if ".layers.3." in n)
    total = sum(t.nbytes for t in tensors.values())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    peak, kept = map(int, done.stdout.split())
    assert kept < 0.52 * total
    assert peak < kept + layer
