"""Llama's weights: grouped-query attention and a gated MLP in every layer."""

from __future__ import annotations

from lockstep.families import rules
from lockstep.families.contract import Shard
from lockstep.families.rules import Stage


def layer(stage: Stage, number: int) -> list[Shard]:
    """One layer's parameters."""
    return rules.norms(stage, number) + rules.attention(stage, number) + rules.mlp(stage, number)


def shards(stage: Stage) -> list[Shard]:
    """One rank's parameters."""
    return rules.decoder(stage, layer)
