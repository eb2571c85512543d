"""An adapter merged into its base checkpoint: a Hugging Face folder without an engine and without
the whole model in memory.

Shape suffixes: O output rows, I input columns, R LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lockstep.models.checkpoint.export import export_checkpoint
from lockstep.models.checkpoint.load import flat_rows, load_shards
from lockstep.models.checkpoint.peft import read_adapter
from lockstep.models.checkpoint.read import Checkpoint, expected_tensors, open_checkpoint
from lockstep.models.checkpoint.shares import box, share_out
from lockstep.models.contract import Shard
from lockstep.models.registry import get_model_support_handler, load_model_config
from lockstep.models.targets import available_targets, lora_sites


def merge_adapter(base: Path, adapter: Path, target: Path) -> Path:
    """Write the checkpoint `base` with the PEFT folder `adapter` merged into it, and return
    `target`.

    Sums are in fp32 and rounded once to the dtype that the base has for the tensor. Raises
    WeightsError for an adapter that is not this model's, or a folder that exists.
    """
    handler, config = get_model_support_handler(str(base)), load_model_config(str(base))
    checkpoint = open_checkpoint(base, handler, config)
    shards = handler.all_shards(config, checkpoint.layout)
    sites = lora_sites(shards, available_targets(shards))
    pairs, info = read_adapter(adapter, sites, config, checkpoint.layout)
    shapes = expected_tensors(handler, config, checkpoint.layout)
    return export_checkpoint(checkpoint, _tensors(checkpoint, shards, shapes, pairs, info.scale), target)


def _tensors(
    checkpoint: Checkpoint,
    shards: list[Shard],
    shapes: Mapping[str, tuple[int, ...]],
    pairs: Mapping[str, Tensor],
    scale: float,
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, fp32 tensor), each as soon as its last part is merged."""
    (shares,) = share_out([shards], shapes)
    pieces = {share.shard.megatron: share.pieces for share in shares}
    under_way: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    by_name = {shard.megatron: shard for shard in shards}
    for megatron, weight in load_shards(checkpoint, shards):
        shard = by_name[megatron]
        rows = flat_rows(merged(shard, weight, pairs, scale), shard)
        for piece, start in pieces.get(megatron, ()):
            assert piece.name is not None
            shape = shapes[piece.name]
            tensor = under_way.setdefault(piece.name, rows.new_empty(shape))
            part = tensor[tuple(slice(*pair) for pair in box(piece, shape))]
            part.copy_(rows[start : start + piece.rows].view(part.shape))
            missing[piece.name] = missing.get(piece.name, math.prod(shape)) - part.numel()
            if not missing[piece.name]:
                yield piece.name, under_way.pop(piece.name)


def merged(shard: Shard, weight: Tensor, pairs: Mapping[str, Tensor], scale: float) -> Tensor:
    """fp32: `weight` plus scale * B @ A of every pair that lands in the parameter.

    pairs: canonical names, `<module>.lora_A` `[R, I]` and `<module>.lora_B` `[O, R]`.
    """
    wide = weight.to(torch.float32, copy=True)
    for site in shard.sites:
        if not site.rows or f"{site.module}.lora_A" not in pairs:
            continue
        a_RI = pairs[f"{site.module}.lora_A"][:, site.cols[0] : site.cols[1]].to(wide)
        b_OR = pairs[f"{site.module}.lora_B"].to(wide)
        into_OI = wide if site.local_expert is None else wide[site.local_expert]
        for rows in site.rows:
            delta_OI = b_OR[rows.start : rows.stop] @ a_RI
            into_OI[rows.shard_start : rows.shard_start + len(delta_OI)] += scale * delta_OI
    return wide
