"""Qwen3 as the engine sees it."""

from __future__ import annotations

from lockstep.models.handler import CompilePolicy, ModelSupportHandler
from lockstep.models.qwen3.spec import DENSE, MOE
from lockstep.models.qwen3.weights import shards

dense = ModelSupportHandler(DENSE, shards)
moe = ModelSupportHandler(MOE, shards, compile=CompilePolicy(regions=("attention", "norm")))
