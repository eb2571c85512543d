"""Qwen3.5, Qwen3.6 and Qwen3.8 as the engine sees them."""

from __future__ import annotations

from lockstep.models.handler import CompilePolicy, ModelSupportHandler
from lockstep.models.qwen3_5.spec import DENSE, MOE
from lockstep.models.qwen3_5.weights import shards

dense = ModelSupportHandler(DENSE, shards)
moe = ModelSupportHandler(MOE, shards, CompilePolicy(regions=("attention", "norm")))
