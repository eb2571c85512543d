"""Llama 3 as the engine sees it."""

from __future__ import annotations

from lockstep.families.handler import ModelSupportHandler
from lockstep.families.llama.contract import shards
from lockstep.families.llama.spec import SPECS

dense = ModelSupportHandler(SPECS[0], shards)
