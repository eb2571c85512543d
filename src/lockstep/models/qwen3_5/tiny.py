"""Tiny Qwen3.5 models. vLLM's CPU kernels for GatedDeltaNet exist for bfloat16 and head dimensions
of 128 only.
"""

from __future__ import annotations

from lockstep.models.tiny.fields import COMMON, EXPERTS, GPU, TinyModel

_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.25,
    "dtype": "bfloat16",
}

_GPU = {**GPU, "head_dim": 256}
_FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")

TINY = {
    "qwen3_5": TinyModel("Qwen3_5ForCausalLM", {**COMMON, **_LINEAR}, _FLOAT32, _GPU),
    "qwen3_5_moe": TinyModel(
        "Qwen3_5MoeForCausalLM", {**COMMON, **_LINEAR, **EXPERTS, "shared_expert_intermediate_size": 64}, _FLOAT32, _GPU
    ),
}
