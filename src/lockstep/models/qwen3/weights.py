"""Qwen3's weights: grouped-query attention with q/k norms; every layer's MLP is dense or routed."""

from __future__ import annotations

from dataclasses import replace

from lockstep.models import layout_rules
from lockstep.models.contract import Shard
from lockstep.models.layout_rules import Stage


def layer(stage: Stage, number: int) -> list[Shard]:
    """One layer's parameters. The dense layers that some MoE models have carry no LoRA on their
    MLP.

    PEFT takes every `gate_proj` of this family for the experts' and would drop theirs without an
    error.
    """
    mlp = layout_rules.moe if stage.config.moe_layers[number] else layout_rules.mlp
    parts = mlp(stage, number)
    if stage.config.is_moe and not stage.config.moe_layers[number]:
        parts = [replace(shard, sites=()) for shard in parts]
    return layout_rules.norms(stage, number) + layout_rules.attention(stage, number) + parts


def shards(stage: Stage) -> list[Shard]:
    """One rank's parameters."""
    return layout_rules.decoder(stage, layer)
