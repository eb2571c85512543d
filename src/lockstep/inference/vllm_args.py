"""What vLLM must be told about a checkpoint or an adapter that it doesn't find out by itself (vLLM 0.32)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_STACKED_ADAPTERS_IN_A_2D_CLASS = "Qwen3_5MoeForCausalLM"
"""vLLM's text-only class takes one pair per expert only; stacked ones, which PEFT and the released class want, need a flag."""


_CONVOLUTIONS = "Qwen3_5"
"""Start of the names of the classes with convolutions, which die of a prompt of one token on a CPU."""


def _classes(model: Path) -> list[str]:
    return json.loads((model / "config.json").read_text(encoding="utf-8")).get("architectures") or []


def needs_two_tokens(model: Path) -> bool:
    """Whether vLLM's CPU build dies of a prompt of one token for this checkpoint's class."""
    return any(name.startswith(_CONVOLUTIONS) for name in _classes(model))


def model_arguments(model: Path, *, lora: bool) -> list[str]:
    """Command-line arguments that follow from the checkpoint's class."""
    classes = _classes(model)
    arguments = []
    if any(name.endswith("ForConditionalGeneration") for name in classes):
        arguments.append("--language-model-only")
    if lora and _STACKED_ADAPTERS_IN_A_2D_CLASS in classes:
        arguments.append("--enable-mixed-moe-lora-format")
    return arguments


def adapter_fields(folder: Path) -> dict[str, Any]:
    """Fields of the request that loads an adapter: whether its routed experts are stacked.

    A folder without an `adapter_config.json` gives none: vLLM then refuses it with its own words.
    """
    path = folder / "adapter_config.json"
    stacked = path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("target_parameters"))
    return {"is_3d_lora_weight": True} if stacked else {}
