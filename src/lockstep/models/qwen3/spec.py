"""Qwen3 as the registry sees it."""

from __future__ import annotations

from lockstep.models.spec import DependencyFloor, ModelSupportSpec, Traits

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_DENSE_SIZES = ("0.6B", "1.7B", "4B", "8B", "14B")
_FLOORS = (
    DependencyFloor("megatron-core", "0.16", "local layer specs without TransformerEngine"),
    DependencyFloor("transformers", "5.16.1", "rope_parameters and stacked experts in the Hugging Face reference"),
)

DENSE = ModelSupportSpec(
    key="qwen3",
    family="qwen3",
    model_names=(
        *(f"Qwen/Qwen3-{size}{kind}" for size in _DENSE_SIZES for kind in ("", "-Base")),
        "Qwen/Qwen3-32B",
        "Qwen/Qwen3-4B-Instruct-2507",
        "Qwen/Qwen3-4B-Thinking-2507",
        "OpenPipe/Qwen3-14B-Instruct",
    ),
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    is_moe=False,
    traits=Traits(qk_norm=True),
    lora_targets=_ATTENTION + _MLP,
    default_target_modules=_ATTENTION + _MLP,
    handler="lockstep.models.qwen3.handler:dense",
    native_vllm_lora_status="validated",
    dependency_floors=_FLOORS,
    evidence="docs/models/qwen3.md",
)

MOE = ModelSupportSpec(
    key="qwen3_moe",
    family="qwen3",
    model_names=(
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-30B-A3B-Base",
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "Qwen/Qwen3-30B-A3B-Thinking-2507",
        "Qwen/Qwen3-235B-A22B",
        "Qwen/Qwen3-235B-A22B-Instruct-2507",
        "Qwen/Qwen3-235B-A22B-Thinking-2507",
    ),
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    is_moe=True,
    traits=Traits(qk_norm=True, head_dim_from_hidden=True),
    lora_targets=(*_ATTENTION, "experts"),
    default_target_modules=(*_ATTENTION, "experts"),
    handler="lockstep.models.qwen3.handler:moe",
    native_vllm_lora_status="validated",
    dependency_floors=_FLOORS,
    evidence="docs/models/qwen3.md",
)

SPECS = (DENSE, MOE)
