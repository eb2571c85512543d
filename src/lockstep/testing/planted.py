"""Faults in a running server's memory, for tests: this file goes into a copy of the plugin, beside
which `fault.json` says what to plant.

Nothing of the product knows of it; a server loads it with `--worker-extension-cls
planted.Receiver`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lockstep_vllm.adapters import slot_writer
from lockstep_vllm.weight_sync import worker_extension
from lockstep_vllm.weight_sync.in_place_load import DirectPlan
from lockstep_vllm.weight_sync.worker_extension import Receiver

__all__ = ["Receiver"]

FILE = Path(__file__).with_name("fault.json")
before: dict[str, Any] = {"buffers": None}


def wanted() -> dict[str, str]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


fill = slot_writer.SlotWriter.fill


@torch.no_grad()
def fill_wrong(self, index, buffers):
    fault, old = wanted(), before["buffers"]
    kind = fault.get("kind", "")
    if kind == "adapter of the step before":
        return fill(self, index, old)
    if kind == "another model's adapter":
        others = [torch.randn(b.numel() // 4, device=b.device).mul(0.01).bfloat16().view(torch.uint8) for b in buffers]
        return fill(
            self, index, [torch.cat([tensor, b[tensor.numel() :]]) for tensor, b in zip(others, buffers, strict=True)]
        )
    fill(self, index, buffers)
    slot = self._slots[index]
    if kind == "stale matrix":
        others = slot_writer.SlotWriter.__new__(slot_writer.SlotWriter)
        live = {id(p.target): p.target.clone() for pieces in slot.copies.pieces for p in pieces}
        others._slots, others._scaling = self._slots, self._scaling
        fill(others, index, old)
        for piece in (piece for pieces in slot.copies.pieces for piece in pieces):
            if piece.name != fault["name"]:
                piece.target.copy_(live[id(piece.target)])
    elif kind == "scaled twice":
        torch._foreach_mul_(slot.scaled, self._scaling)
    elif kind == "missing expert":
        experts = next(b for b in slot.scaled if b.dim() == 3 and b.shape[0] > 1)
        experts[1].zero_()
    elif kind == "left in the padding":
        slot.empty[0].view(-1)[-1] = 0.5
    elif kind == "layer switched off":
        slot.switches[0].fill_(0)
    if not kind:
        before["buffers"] = [b.clone() for b in buffers]
    return None


slot_writer.SlotWriter.fill = fill_wrong

copy = DirectPlan.copy


@torch.no_grad()
def copy_wrong(self, bucket, bytes_N):
    """The direct path leaves one weight as it was."""
    name = wanted().get("weight")
    kept = [(piece, piece.target.clone()) for piece in self.pieces[bucket] if piece.name == name]
    copy(self, bucket, bytes_N)
    for piece, old in kept:
        piece.target.copy_(old)


assemble = worker_extension.assemble


def assemble_wrong(plan, buffers):
    """vLLM's own loading is given one weight of the checkpoint that the server started from."""
    fault = wanted()
    for name, tensor in assemble(plan, buffers):
        if name != fault.get("loaded"):
            yield name, tensor
            continue
        with safe_open(Path(fault["folder"]) / "model.safetensors", framework="pt") as file:
            yield name, file.get_tensor(name).to(tensor.dtype)


DirectPlan.copy = copy_wrong
worker_extension.assemble = assemble_wrong
