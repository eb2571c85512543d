"""Adapters on disk: a PEFT folder that PEFT, vLLM and the trainer load as it is.

Canonically an adapter is one pair per module, `<module>.lora_A` `[r, in]` and `<module>.lora_B`
`[out, r]`. Modules and rows are named and ordered as in Hugging Face (`models.contract.LoraSite`).
The file differs in two ways only. Names carry PEFT's prefix and the checkpoint's own
(`model.language_model.` for the released multimodal classes). Where a routed expert's gate and up
share one pair, all experts of a layer are stacked as PEFT does for parameters `[E, out, in]`. Then
A is `[E * r, in]`, experts outermost, and B is `[out, r * E]`, experts innermost; gate/up lie under
`experts.base_layer`, down under `experts`.

Shape suffixes: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lockstep.errors import WeightsError
from lockstep.models.config import ModelConfig
from lockstep.models.contract import Layout, LoraSite

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX, _CANONICAL = "base_model.model.", "model."
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_up_proj|down_proj)\.(lora_[AB])")
_STACKED = re.compile(r"(.*\.mlp\.experts)(\.base_layer)?\.(lora_[AB])")


@dataclass(frozen=True)
class AdapterInfo:
    """The fields of `adapter_config.json`.

    alpha: of the scale alpha / rank, also where the file has `use_rslora`.
    targets: as the user names them (`experts` for routed experts).
    """

    base_model: str
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def write_adapter(
    folder: Path | str, tensors: Mapping[str, Tensor], info: AdapterInfo, config: ModelConfig, layout: Layout
) -> Path:
    """Write canonical tensors as a PEFT folder and return it. Dtypes are kept."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: t.detach().cpu().contiguous() for name, t in to_peft(tensors, config, layout).items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(adapter_config(info, config), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def read_adapter(
    folder: Path | str, sites: Sequence[LoraSite], config: ModelConfig, layout: Layout
) -> tuple[dict[str, Tensor], AdapterInfo]:
    """Canonical tensors and description of a PEFT folder.

    sites: every pair of the whole model; an adapter has all pairs of a target or none.

    Raises WeightsError for a missing or unknown tensor, for one of another shape, and for a config
    that the trainer can't honour.
    """
    folder = Path(folder)
    info = _read_info(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{folder / WEIGHTS} is damaged ({error}); write the adapter again") from None
    tensors = from_peft(stored, config, layout)
    targets = tuple(dict.fromkeys(s.target for s in sites if f"{s.module}.lora_A" in tensors))
    _check(folder, tensors, [s for s in sites if s.target in targets], info.rank)
    return tensors, replace(info, targets=targets)


def to_peft(tensors: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """Canonical names and tensors to those of the file."""
    renamed: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        expert = _EXPERT.fullmatch(name) if config.fused_expert_lora else None
        if expert is None:
            renamed[peft_name(name, layout)] = tensor
            continue
        base, number, module, side = expert.groups()
        owner = f"{base}.base_layer" if module == "gate_up_proj" else base
        stacks.setdefault(peft_name(f"{owner}.{side}", layout), {})[int(number)] = tensor
    for name, experts in stacks.items():
        if sorted(experts) != list(range(config.experts)):
            raise WeightsError(
                f"{name}: {len(experts)} of {config.experts} experts have a pair; an adapter covers all or none"
            )
        each = [experts[e] for e in range(config.experts)]
        renamed[name] = torch.cat(each) if "lora_A" in name else torch.stack(each, dim=-1).flatten(1)
    return renamed


def from_peft(stored: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """The names and tensors of a file to canonical ones."""
    tensors: dict[str, Tensor] = {}
    for file_name, tensor in stored.items():
        name = _canonical_name(file_name, layout)
        stacked = _STACKED.fullmatch(name) if config.fused_expert_lora else None
        if stacked is None:
            tensors[name] = tensor
            continue
        base, inner, side = stacked.groups()
        module, count = ("gate_up_proj" if inner else "down_proj"), config.experts
        if tensor.shape[0 if side == "lora_A" else 1] % count:
            raise WeightsError(f"{file_name} has shape {list(tensor.shape)}, which {count} experts don't divide")
        each = tensor.chunk(count) if side == "lora_A" else tensor.unflatten(1, (-1, count)).unbind(-1)
        tensors |= {f"{base}.{e}.{module}.{side}": part.contiguous() for e, part in enumerate(each)}
    return tensors


def adapter_config(info: AdapterInfo, config: ModelConfig) -> dict[str, Any]:
    """The fields of `adapter_config.json`."""
    modules = [t for t in info.targets if t != "experts"]
    parameters = None
    if "experts" in info.targets and config.fused_expert_lora:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    elif "experts" in info.targets:
        # PEFT itself turns these names into the stacked parameters of transformers 5.
        modules += [t for t in ("gate_proj", "up_proj", "down_proj") if t not in modules]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base_model,
        "r": info.rank,
        "lora_alpha": info.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": modules,
        "target_parameters": parameters,
        "use_dora": False,
        "use_rslora": False,  # where the run has it, lora_alpha is larger instead
    }


def _read_info(folder: Path) -> AdapterInfo:
    """The description of an adapter folder. Raises WeightsError for what the trainer doesn't do
    (DoRA, rank patterns, biases, ...).
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} has no {name}; give a PEFT adapter folder")
    try:
        raw = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        rank, alpha = int(raw["r"]), float(raw["lora_alpha"])
        scaled = alpha * math.sqrt(rank) if raw.get("use_rslora") else alpha
        info = AdapterInfo(str(raw.get("base_model_name_or_path")), rank, scaled, ())
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder / CONFIG} is damaged ({error!r}); write the adapter again") from error
    wanted = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "use_dora": (False, None),
        "fan_in_fan_out": (False, None),
    }
    off = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "lora_bias")
    wrong = [k for k, allowed in wanted.items() if raw.get(k) not in allowed] + [k for k in off if raw.get(k)]
    if wrong:
        raise WeightsError(
            f"{folder / CONFIG}: {wrong[0]} is {raw.get(wrong[0])!r}, which is not supported for training"
        )
    return info


def initial_a(site: LoraSite, rank: int, seed: int) -> Tensor:
    """The A that training starts from, fp32 `[R, I]`: uniform in +-1/sqrt(I), PEFT's default.

    It depends on the seed and the module's name only, so every parallel layout draws the same.
    """
    digest = hashlib.sha256(f"{seed}:{site.module}.lora_A".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = site.in_features**-0.5
    return torch.rand(rank, site.in_features, generator=generator) * (2 * bound) - bound


def identity_adapter(
    sites: Sequence[LoraSite], rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """An adapter that changes nothing: B is zero."""
    tensors: dict[str, Tensor] = {}
    for site in sites:
        tensors[f"{site.module}.lora_A"] = initial_a(site, rank, seed).to(dtype)
        tensors[f"{site.module}.lora_B"] = torch.zeros(site.out_features, rank, dtype=dtype)
    return tensors


def peft_name(name: str, layout: Layout) -> str:
    """A canonical tensor name as the file has it, with PEFT's prefix and the checkpoint's own."""
    return f"{_PREFIX}{layout.prefix}{name.removeprefix(_CANONICAL)}.weight"


def _canonical_name(file_name: str, layout: Layout) -> str:
    start, end = _PREFIX + layout.prefix, ".weight"
    if not file_name.startswith(start) or not file_name.endswith((f".lora_A{end}", f".lora_B{end}")):
        raise WeightsError(f"{file_name} is no LoRA tensor of this model, whose names start with {start}")
    return _CANONICAL + file_name.removeprefix(start).removesuffix(end)


def _check(folder: Path, tensors: Mapping[str, Tensor], sites: Sequence[LoraSite], rank: int) -> None:
    wanted = {f"{s.module}.lora_A": (rank, s.in_features) for s in sites}
    wanted |= {f"{s.module}.lora_B": (s.out_features, rank) for s in sites}
    for kind, names in (("lacks", set(wanted) - set(tensors)), ("has the unknown", set(tensors) - set(wanted))):
        if names:
            raise WeightsError(
                f"{folder} {kind} {min(names)} ({len(names)} tensors); its target_modules and the model's don't match"
            )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(f"{folder}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
