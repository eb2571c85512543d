"""Qwen3.5 and Qwen3.6 as the engine sees them."""

from __future__ import annotations

from typing import Any

from lockstep.families.handler import CompilePolicy, ModelSupportHandler
from lockstep.families.qwen3_5.contract import shards
from lockstep.families.qwen3_5.spec import DENSE, MOE

_OPTIONS: dict[str, Any] = {"layernorm_zero_centered_gamma": True, "attention_output_gate": True}

dense = ModelSupportHandler(DENSE, shards, _OPTIONS)
moe = ModelSupportHandler(
    MOE, shards, _OPTIONS | {"moe_shared_expert_gate": True}, CompilePolicy(regions=("attention", "norm"))
)
