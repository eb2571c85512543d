"""Adapters that never touch a disk: staged in the worker, loaded by vLLM under a path `mem://...`.

vLLM 0.32 loads an adapter from a folder only. Its manager's `_load_adapter` is given a second source here: tensors that
a weight sync has staged. They stay staged as long as the adapter is served, since vLLM loads it again after it fell out
of its cache. A path is used once: vLLM keys its prefix cache on an adapter's name and path.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch

SCHEME = "mem://"

staged: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}
"""Path to (fields of adapter_config.json, tensors by their names in a PEFT file)."""


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
    """The checks and the steps of vLLM's own loader, from tensors instead of a file."""
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
    lora = manager._lora_model_cls.from_lora_tensors(
        lora_model_id=lora_request.lora_int_id,
        tensors=tensors,
        peft_helper=helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper,
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    lora.is_3d_lora_weight = lora_request.is_3d_lora_weight
    adapters._validate_moe_lora_format(lora)
    return lora


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
