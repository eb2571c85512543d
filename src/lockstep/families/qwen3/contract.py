"""Qwen3's weights: grouped-query attention with q/k norms; every layer's MLP is dense or routed."""

from __future__ import annotations

from dataclasses import replace

from lockstep.families import rules
from lockstep.families.contract import Shard
from lockstep.families.rules import Stage


def layer(stage: Stage, number: int) -> list[Shard]:
    """One layer's parameters. The dense layers that some MoE models have carry no LoRA on their MLP.

    PEFT takes every `gate_proj` of this family for the experts' and would drop theirs without an error.
    """
    mlp = rules.moe if stage.config.moe_layers[number] else rules.mlp
    parts = mlp(stage, number)
    if stage.config.is_moe and not stage.config.moe_layers[number]:
        parts = [replace(shard, sites=()) for shard in parts]
    return rules.norms(stage, number) + rules.attention(stage, number) + parts


def shards(stage: Stage) -> list[Shard]:
    """One rank's parameters."""
    return rules.decoder(stage, layer)
