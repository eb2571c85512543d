"""Facts about a checkpoint or an adapter that vLLM doesn't find out by itself, as its arguments
(vLLM 0.32).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lockstep.models.registry import spec_of_folder
from lockstep.models.spec import ServerFacts


def server_facts(model: Path) -> ServerFacts:
    """Those of the checkpoint's family; of a model that is not registered nothing is known."""
    spec = spec_of_folder(model)
    return ServerFacts() if spec is None else spec.server


def model_arguments(model: Path, *, lora: bool) -> list[str]:
    """Command-line arguments that follow from the checkpoint's architecture."""
    facts = server_facts(model)
    named = json.loads((model / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    known = facts.arguments + (facts.lora_arguments if lora else ())
    return [argument for architecture, argument in known if architecture in named]


def adapter_fields(folder: Path) -> dict[str, Any]:
    """Fields of the request that loads an adapter: whether its routed experts are stacked.

    A folder without an `adapter_config.json` gives none: vLLM then refuses it with its own words.
    """
    path = folder / "adapter_config.json"
    stacked = path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("target_parameters"))
    return {"is_3d_lora_weight": True} if stacked else {}
