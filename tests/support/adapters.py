"""Random adapters of tiny checkpoints, and the merge that they are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from lockstep.models.checkpoint.export import export_checkpoint
from lockstep.models.checkpoint.load import load_shards
from lockstep.models.checkpoint.peft import AdapterInfo, write_adapter
from lockstep.models.checkpoint.read import expected_tensors, open_checkpoint
from lockstep.models.contract import Shard
from lockstep.models.registry import get_model_support_handler, load_model_config
from lockstep.models.targets import available_targets, lora_sites
from lockstep.validate.reference.assembled import hf_tensors

RANK, ALPHA = 3, 7.0


def random_adapter(sites: list, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{s.module}.lora_A": (RANK, s.in_features) for s in sites}
    shapes |= {f"{s.module}.lora_B": (s.out_features, RANK) for s in sites}
    return {n: torch.randn(shape, generator=generator) * shape[1] ** -0.5 * 0.5 for n, shape in shapes.items()}


def merged(shard: Shard, tensor: torch.Tensor, adapter: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """`tensor` plus scale * B @ A of every pair in `adapter` that lands in it, computed in fp32 and rounded once.

    adapter: canonical names, `<module>.lora_A` `[r, in]` and `<module>.lora_B` `[out, r]`; modules it lacks change
    nothing.
    """
    sites = [site for site in shard.sites if site.rows and f"{site.module}.lora_A" in adapter]
    if not sites:
        return tensor
    wide = tensor.to(torch.float32, copy=True)
    for site in sites:
        a_RI = adapter[f"{site.module}.lora_A"][:, site.cols[0] : site.cols[1]].to(wide)
        b_OR = adapter[f"{site.module}.lora_B"].to(wide)
        into_OI = wide if site.local_expert is None else wide[site.local_expert]
        for rows in site.rows:
            delta_OI = b_OR[rows.start : rows.stop] @ a_RI
            into_OI[rows.shard_start : rows.shard_start + delta_OI.shape[0]] += scale * delta_OI
    return wide.to(tensor.dtype)


class Model:
    """A tiny checkpoint with everything needed to write adapters for it and to merge them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handler, self.config = get_model_support_handler(str(folder)), load_model_config(str(folder))
        self.checkpoint = open_checkpoint(folder, self.handler, self.config)
        self.shards = self.handler.all_shards(self.config, self.checkpoint.layout)
        self.targets = available_targets(self.shards)
        self.sites = lora_sites(self.shards, self.targets)

    def merge(self, adapter: dict[str, torch.Tensor], target: Path) -> Path:
        state = dict(load_shards(self.checkpoint, self.shards))
        for shard in self.shards:
            state[shard.megatron] = merged(shard, state[shard.megatron], adapter, ALPHA / RANK)
        shapes = expected_tensors(self.handler, self.config, self.checkpoint.layout)
        return export_checkpoint(self.checkpoint, hf_tensors([(self.shards, state)], shapes), target)

    def write(self, folder: Path, adapter: dict[str, torch.Tensor], targets: tuple[str, ...]) -> Path:
        info = AdapterInfo(str(self.folder), RANK, ALPHA, targets)
        return write_adapter(folder, adapter, info, self.config, self.checkpoint.layout)


def released(folder: Path) -> torch.nn.Module:
    """The multimodal class that the folder names, answering for text like the text class."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)


def hugging_face(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
