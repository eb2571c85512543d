"""Llama's weights: grouped-query attention and a gated MLP in every layer."""

from __future__ import annotations

from lockstep.models import layout_rules
from lockstep.models.contract import Shard
from lockstep.models.layout_rules import Stage


def layer(stage: Stage, number: int) -> list[Shard]:
    """One layer's parameters."""
    return layout_rules.norms(stage, number) + layout_rules.attention(stage, number) + layout_rules.mlp(stage, number)


def shards(stage: Stage) -> list[Shard]:
    """One rank's parameters."""
    return layout_rules.decoder(stage, layer)
