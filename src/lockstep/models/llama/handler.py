"""Llama 3 as the engine sees it."""

from __future__ import annotations

from lockstep.models.handler import ModelSupportHandler
from lockstep.models.llama.spec import SPECS
from lockstep.models.llama.weights import shards

dense = ModelSupportHandler(SPECS[0], shards)
