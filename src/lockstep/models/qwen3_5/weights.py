"""Qwen3.5's weights: GatedDeltaNet layers with gated attention in between; every layer's MLP is
dense or routed with a shared expert.
"""

from __future__ import annotations

from lockstep.models import layout_rules
from lockstep.models.contract import Shard
from lockstep.models.layout_rules import Stage


def layer(stage: Stage, number: int) -> list[Shard]:
    """One layer's parameters."""
    mixer = (
        layout_rules.gated_delta_net
        if stage.config.layer_types[number] == "linear_attention"
        else layout_rules.attention
    )
    mlp = layout_rules.moe if stage.config.moe_layers[number] else layout_rules.mlp
    return layout_rules.norms(stage, number) + mixer(stage, number) + mlp(stage, number)


def shards(stage: Stage) -> list[Shard]:
    """One rank's parameters."""
    return layout_rules.decoder(stage, layer)
