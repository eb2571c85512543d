"""Tiny Qwen3 models."""

from __future__ import annotations

from lockstep.models.tiny.fields import COMMON, EXPERTS, TinyModel

TINY = {
    "qwen3": TinyModel("Qwen3ForCausalLM", {**COMMON, "tie_word_embeddings": True}),
    "qwen3_moe": TinyModel("Qwen3MoeForCausalLM", {**COMMON, **EXPERTS, "norm_topk_prob": True}),
}
