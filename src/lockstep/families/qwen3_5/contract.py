"""Qwen3.5's weights: GatedDeltaNet layers with gated attention in between; every layer's MLP is dense or routed with a
shared expert.
"""

from __future__ import annotations

from lockstep.families import rules
from lockstep.families.contract import Shard
from lockstep.families.rules import Stage


def layer(stage: Stage, number: int) -> list[Shard]:
    """One layer's parameters."""
    mixer = rules.gated_delta_net if stage.config.layer_types[number] == "linear_attention" else rules.attention
    mlp = rules.moe if stage.config.moe_layers[number] else rules.mlp
    return rules.norms(stage, number) + mixer(stage, number) + mlp(stage, number)


def shards(stage: Stage) -> list[Shard]:
    """One rank's parameters."""
    return rules.decoder(stage, layer)
