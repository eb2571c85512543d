"""Random checkpoints in every layout users bring, with tensor names and shapes taken from transformers' own classes."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

RELEASED = {"qwen3_5": "Qwen3_5ForConditionalGeneration", "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration"}
TEXT = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "llama3": "LlamaForCausalLM",
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "patch_size": 2,
}

PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 2,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"longest_edge": 4096, "shortest_edge": 64},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
VIDEO_PREPROCESSOR = {**PREPROCESSOR, "video_processor_type": "Qwen3VLVideoProcessor"}
"""A server reads these of every multimodal checkpoint, also when it serves the language model only."""


@dataclass(frozen=True)
class Recipe:
    """What a random checkpoint looks like. `fields` are those of the text config."""

    key: str
    fields: dict[str, Any]
    released: bool = False
    stacked: bool = False
    stored_tied_head: bool = False
    files: int = 1
    mtp: dict[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def config_json(recipe: Recipe) -> dict[str, Any]:
    """The config.json that transformers writes for the recipe, with its MTP fields beside the text fields."""
    text = getattr(transformers, TEXT[recipe.key]).config_class(**recipe.fields)
    if not recipe.released:
        return {**text.to_diff_dict(), "architectures": [TEXT[recipe.key]], **recipe.mtp}
    outer = getattr(transformers, RELEASED[recipe.key]).config_class(
        text_config=text.to_dict(), vision_config=VISION, tie_word_embeddings=text.tie_word_embeddings
    )
    raw = outer.to_diff_dict()
    raw["text_config"] |= recipe.mtp
    return {**raw, "architectures": [RELEASED[recipe.key]]}


def tensor_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes as stored: the class's parameters, experts stacked or one by one, and MTP tensors beside them."""
    name = (RELEASED if recipe.released else TEXT)[recipe.key]
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class.from_dict(config_json(recipe)))
    shapes: dict[str, tuple[int, ...]] = {}
    for key, parameter in model.named_parameters():
        shapes |= {key: tuple(parameter.shape)} if recipe.stacked else _one_by_one(key, tuple(parameter.shape))
    if recipe.stored_tied_head:
        prefix = "model.language_model." if recipe.released else "model."
        shapes["lm_head.weight"] = shapes[f"{prefix}embed_tokens.weight"]
    if recipe.mtp:
        hidden = recipe.fields["hidden_size"]
        shapes |= {"mtp.fc.weight": (hidden, 2 * hidden), "mtp.layers.0.input_layernorm.weight": (hidden,)}
    return shapes


def _one_by_one(key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if key.endswith("experts.gate_up_proj"):
        base, (count, rows, cols) = key.removesuffix("gate_up_proj"), shape
        names = ("gate_proj", "up_proj")
        return {f"{base}{e}.{n}.weight": (rows // 2, cols) for e in range(count) for n in names}
    if key.endswith("experts.down_proj"):
        base, (count, rows, cols) = key.removesuffix("down_proj"), shape
        return {f"{base}{e}.down_proj.weight": (rows, cols) for e in range(count)}
    return {key: shape}


def write_checkpoint(recipe: Recipe, folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write the folder (several files get an index) and return its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(recipe).items():
        dtype = torch.float32 if name.endswith("A_log") else recipe.dtype
        tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    if recipe.stored_tied_head:
        prefix = "model.language_model." if recipe.released else "model."
        tensors["lm_head.weight"] = tensors[f"{prefix}embed_tokens.weight"].clone()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(recipe), indent=3, default=str))
    names = list(tensors)
    random.Random(seed).shuffle(names)
    if recipe.files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map = {
        name: f"model-{i % recipe.files + 1:05d}-of-{recipe.files:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def release(text: Path, target: Path, stacked: bool = True) -> Path:
    """A text-only Qwen3.5 checkpoint turned into the released multimodal form, with random vision tower and MTP
    tensors.
    """
    raw = json.loads((text / "config.json").read_text())
    key = raw["model_type"].removesuffix("_text")
    cls = getattr(transformers, RELEASED[key])
    outer = cls.config_class(text_config=raw, vision_config=VISION, tie_word_embeddings=raw["tie_word_embeddings"])
    tensors = {}
    for name, tensor in load_file(text / "model.safetensors").items():
        tensors["model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name] = tensor
    if stacked:
        tensors = _stack(tensors, raw.get("num_experts", 0))
    with torch.device("meta"):
        model = cls(outer)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith("model.visual."):
            tensors[name] = torch.randn(parameter.shape, generator=generator)
    tensors["mtp.fc.weight"] = torch.randn(8, 16, generator=generator)
    written = {**outer.to_diff_dict(), "architectures": [RELEASED[key]]}
    written["text_config"] |= {"mtp_num_hidden_layers": 1}
    target.mkdir()
    for path in text.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, target)
    (target / "config.json").write_text(json.dumps(written, indent=2, default=str))
    (target / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (target / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_PREPROCESSOR))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _stack(tensors: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    bases = sorted({n.split(".experts.")[0] + ".experts." for n in tensors if ".experts." in n})
    for base in bases:
        gate, up, down = (
            torch.stack([tensors.pop(f"{base}{e}.{n}_proj.weight") for e in range(experts)])
            for n in ("gate", "up", "down")
        )
        tensors[f"{base}gate_up_proj"], tensors[f"{base}down_proj"] = torch.cat([gate, up], 1), down
    return tensors
