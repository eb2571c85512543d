"""Adapters that never touch a disk: staged in the worker, loaded by vLLM under a path `mem://...`.

vLLM 0.32 loads an adapter from a folder only. Its manager's `_load_adapter` is given a second source here: tensors that
a weight sync has staged. They stay staged as long as the adapter is served, since vLLM loads it again after it fell out
of its cache. A path is used once: vLLM keys its prefix cache on an adapter's name and path.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import re
from typing import Any

import torch

SCHEME = "mem://"

_STACKED = re.compile(r"\.mlp\.experts\.(gate_proj|up_proj|down_proj|gate_up_proj)\.lora_[AB]\.weight$")
"""A layer's experts in one tensor; those of a PEFT file carry a number, or no projection's name."""

staged: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}
"""Path to (fields of adapter_config.json, tensors by their names in a PEFT file)."""


def nbytes() -> int:
    """Bytes of all staged tensors."""
    return sum(tensor.nbytes for _, tensors in staged.values() for tensor in tensors.values())


def check_config(config: dict[str, Any], lora_config: Any) -> None:
    """Raises ValueError when this server can't serve an adapter of that kind: no LoRA at all, or too high a rank."""
    from vllm.lora.peft_helper import PEFTHelper

    if lora_config is None:
        raise ValueError("this server was started without room for adapters")
    PEFTHelper.from_dict(dict(config)).validate_legal(lora_config)


def apply() -> None:
    """Teaches vLLM's adapter manager, in this worker, the paths above. Does nothing the second time."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = WorkerLoRAManager._load_adapter
    if getattr(original, "lockstep", False):
        return

    def load_adapter(self, lora_request):
        if lora_request.lora_path.startswith(SCHEME):
            return _from_memory(self, lora_request)
        return original(self, lora_request)

    load_adapter.lockstep = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = load_adapter


def _from_memory(manager: Any, lora_request: Any) -> Any:
    """The checks and the steps of vLLM's own loader, from tensors instead of a file, on the device that the tensors are on."""
    from vllm.lora.peft_helper import PEFTHelper

    config, tensors = staged[lora_request.lora_path]
    helper = PEFTHelper.from_dict(dict(config))
    helper.validate_legal(manager.lora_config)
    adapters = manager._adapter_manager
    if adapters.moe_ep_load_spec is not None:
        raise ValueError("adapters from memory are not served with expert parallelism: load them from a folder")
    model = adapters.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    _check_modules(adapters, tensors, mapper)
    dtype = manager.lora_config.lora_dtype
    # vLLM multiplies B by alpha/r in place, and loads an adapter again when it fell out of its cache: it gets a B of its own.
    given = {name: t.to(dtype, copy=name.endswith("lora_B.weight")) for name, t in tensors.items()}
    stacked = {name: given.pop(name) for name in list(given) if _STACKED.search(name)}
    lora = manager._lora_model_cls.from_lora_tensors(
        lora_model_id=lora_request.lora_int_id,
        tensors=given,
        peft_helper=helper,
        device=str(next(iter(tensors.values())).device),
        dtype=dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper,
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    _add_stacked(lora, stacked, helper, adapters, mapper)
    lora.is_3d_lora_weight = lora_request.is_3d_lora_weight
    adapters._validate_moe_lora_format(lora)
    return lora


def _add_stacked(lora: Any, stacked: dict[str, torch.Tensor], helper: Any, adapters: Any, mapper: Any) -> None:
    """Experts that come stacked, A [E, r, in] and B [E, out, r], in the form vLLM would pack them into, as they are.

    One pair per expert, as a file has them, would be 37,000 tensors for 48 layers of 128 experts, each with its own Python.
    """
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.utils import parse_fine_tuned_lora_name

    layers: dict[str, dict[tuple[str, bool], torch.Tensor]] = {}
    for name, tensor in stacked.items():
        module, is_a = parse_fine_tuned_lora_name(name, mapper)
        owner, _, projection = module.rpartition(".")
        layers.setdefault(owner, {})[projection, is_a] = tensor
    for owner, given in layers.items():
        a, b = (_as_packed(adapters.modules[owner], owner, given, is_a) for is_a in (True, False))
        rank, scaling = helper.get_rank_and_scaling(owner)
        lora.loras[owner] = PackedLoRALayerWeights(
            owner, rank, [helper.lora_alpha] * len(a), a, b, scaling=[scaling] * len(a)
        )


def _as_packed(module: Any, owner: str, given: dict[tuple[str, bool], torch.Tensor], is_a: bool) -> list[torch.Tensor]:
    """The list that the layer's `set_lora` takes: gate, down, up; or where the layer has gate and up as one matrix, that and down.

    A layer with two matrices (vLLM's text-only class of Qwen3.5, its mixed format) takes a pair for both as two that share A.
    """
    from vllm.lora.layers import FusedMoE3DWithLoRA

    fused, takes_fused = ("gate_up_proj", is_a) in given, isinstance(module, FusedMoE3DWithLoRA)
    wanted = ("gate_up_proj", "down_proj") if fused else ("gate_proj", "down_proj", "up_proj")
    missing = [one for one in wanted if (one, is_a) not in given]
    if missing or (takes_fused and not fused):
        raise ValueError(
            f"the adapter's experts of {owner!r} are {sorted({one for one, _ in given})}, "
            f"which this model's {type(module).__name__} can't take: load the adapter from a folder"
        )
    if fused and not takes_fused:
        both, down = given["gate_up_proj", is_a], given["down_proj", is_a]
        gate, up = (both, both) if is_a else both.chunk(2, dim=1)  # B [E, out, r], gate's rows first
        return [gate, down, up]
    return [given[one, is_a] for one in wanted]


def _check_modules(adapters: Any, tensors: dict[str, torch.Tensor], mapper: Any) -> None:
    """vLLM leaves out what it finds no module for, without a word: here that is an error."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    parts_of = adapters.packed_modules_mapping
    known: set[str] = set()
    for module in adapters.modules:
        owner, _, last = module.rpartition(".")
        known.update(f"{owner}.{part}" for part in (*parts_of.get(last, ()), last))
    for name in tensors:
        module, _ = parse_fine_tuned_lora_name(name, mapper)
        experts, found, _ = module.partition(".experts")
        if module not in known and not (found and f"{experts}.experts" in known):
            raise ValueError(f"the adapter has weights for {module!r}, which this model has no LoRA layer for")
