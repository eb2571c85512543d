"""Qwen3 as the engine sees it."""

from __future__ import annotations

from lockstep.families.handler import CompilePolicy, ModelSupportHandler
from lockstep.families.qwen3.contract import shards
from lockstep.families.qwen3.spec import DENSE, MOE

dense = ModelSupportHandler(DENSE, shards)
moe = ModelSupportHandler(MOE, shards, compile=CompilePolicy(regions=("attention", "norm")))
