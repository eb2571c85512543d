"""A tiny Llama 3, short enough in its original context that the scaled frequencies matter."""

from __future__ import annotations

from lockstep.models.tiny.fields import COMMON, TinyModel

_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

TINY = {"llama3": TinyModel("LlamaForCausalLM", {**COMMON, "rope_parameters": _ROPE})}
