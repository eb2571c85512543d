"""Adapters that vLLM loaded from a folder, compared with the folder's file. The slot must hold what
a sync from memory would put there.

A PEFT file has one pair for each expert, or all experts of a layer in one matrix. Here they are
stacked as adapters from memory are (`from_memory.py`), and the same slot writer names every element
of a slot.

Shapes: E experts, R LoRA rank, I inputs, O outputs.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lockstep_vllm.adapters import from_memory
from lockstep_wire.plan import Slot, TensorMeta, WireBucket, WirePlan

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.((?:gate|up|down)_proj\.lora_[AB]\.weight)")
_ALL_EXPERTS = re.compile(r"(.*\.mlp\.experts)(\.base_layer)?\.(lora_([AB])\.weight)")


def refusal(folder: Path, lora_id: int, version: str, worker: int, manager: Any) -> tuple[str, bool]:
    """(What the live slot of `version` holds otherwise than the folder, "" when nothing is; whether
    it could be compared.)

    lora_id: of the adapter that requests for `version` use.
    manager: vLLM's WorkerLoRAManager.

    Raises ValueError for a module that the server has no LoRA layer for, which vLLM leaves out
    without a word.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = stacked(load_file(folder / "adapter_model.safetensors", device=str(manager.device)), int(config["r"]))
    buckets = tuple(_bucket(i, name, tensor) for i, (name, tensor) in enumerate(tensors.items()))
    plan = WirePlan(
        str(folder),
        1,
        buckets,
        {name: TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
    )
    ids = manager._adapter_manager.lora_index_to_id
    if lora_id not in ids:
        return f"worker {worker} has no slot with {version}", True
    slot_writer = from_memory.make_slot_writer(manager, config, plan)
    if slot_writer is None:
        return "", False
    buffers = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()]
    return slot_writer.refusal(ids.index(lora_id), slot_writer.expected(buffers), version, worker), True


def stacked(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """A file's tensors, routed experts as A [E, R, I] and B [E, O, R], with one tensor for each
    layer and projection.
    """
    done: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        single, every = _EXPERT.fullmatch(name), _ALL_EXPERTS.fullmatch(name)
        if single is not None:
            experts.setdefault(f"{single[1]}.{single[3]}", {})[int(single[2])] = tensor
        elif every is not None:
            projection = "gate_up_proj" if every[2] else "down_proj"
            count = tensor.shape[0 if every[4] == "A" else 1] // rank
            split = tensor.unflatten(0, (count, rank)) if every[4] == "A" else tensor.unflatten(1, (rank, count))
            done[f"{every[1]}.{projection}.{every[3]}"] = split if every[4] == "A" else split.permute(2, 0, 1)
        else:
            done[name] = tensor
    for name, each in experts.items():
        done[name] = torch.stack([each[e] for e in sorted(each)])
    return done


def _bucket(index: int, name: str, tensor: torch.Tensor) -> WireBucket:
    box = tuple((0, size) for size in tensor.shape)
    return WireBucket(0, index, tensor.nbytes, (Slot(TensorMeta(name, tensor.dtype, tuple(tensor.shape)), box, 0),))
