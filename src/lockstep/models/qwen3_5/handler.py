"""Qwen3.5 and Qwen3.6 as the engine sees them."""

from __future__ import annotations

from typing import Any

from lockstep.models.handler import CompilePolicy, ModelSupportHandler
from lockstep.models.qwen3_5.spec import DENSE, MOE
from lockstep.models.qwen3_5.weights import shards

_OPTIONS: dict[str, Any] = {"layernorm_zero_centered_gamma": True, "attention_output_gate": True}

dense = ModelSupportHandler(DENSE, shards, _OPTIONS)
moe = ModelSupportHandler(
    MOE, shards, _OPTIONS | {"moe_shared_expert_gate": True}, CompilePolicy(regions=("attention", "norm"))
)
