"""Qwen3.5, Qwen3.6 and Qwen3.8 as the registry sees them."""

from __future__ import annotations

from lockstep.models.spec import DependencyFloor, ModelSupportSpec, ServerFacts, Traits

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEAR = ("in_proj_qkv", "in_proj_z", "out_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_SMALL = ("in_proj_b", "in_proj_a")
"""The two projections to one number per head: trainable on request, too small to matter by default.
"""
_FLOORS = (
    DependencyFloor("megatron-core", "0.16", "attention_output_gate"),
    DependencyFloor("transformers", "5.16.1", "the Qwen3.5 classes"),
)
_SKIPPED = (
    ("mtp.", "multi-token-prediction layers are not trained"),
    ("model.visual.", "the vision tower is not trained"),
)
_SERVER = ServerFacts(
    arguments=(
        ("Qwen3_5ForConditionalGeneration", "--language-model-only"),
        ("Qwen3_5MoeForConditionalGeneration", "--language-model-only"),
    ),
    # vLLM's text-only class takes one pair per expert only; stacked ones, which PEFT and the
    # released class want, need a flag.
    lora_arguments=(("Qwen3_5MoeForCausalLM", "--enable-mixed-moe-lora-format"),),
    # The convolutions of GatedDeltaNet want two tokens there, and hybrid models choose the block
    # size.
    one_token_prompts_on_cpu=False,
    own_block_size_on_cpu=True,
)


def _traits(moe: bool) -> Traits:
    return Traits(
        qk_norm=True,
        output_gate=True,
        zero_centered_norm=True,
        partial_rotary=0.25,
        layer_kinds=("full_attention", "linear_attention"),
        full_attention_interval=4,
        norm_topk_prob=True if moe else None,
        fused_expert_lora=moe,
    )


DENSE = ModelSupportSpec(
    key="qwen3_5",
    family="qwen3_5",
    model_names=(
        *(f"Qwen/Qwen3.5-{size}{kind}" for size in ("0.8B", "2B", "4B", "9B") for kind in ("", "-Base")),
        "Qwen/Qwen3.5-27B",
        "Qwen/Qwen3.6-27B",
        "Qwen/Qwen3.8-27B",
    ),
    architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    model_types=("qwen3_5", "qwen3_5_text"),
    is_moe=False,
    traits=_traits(moe=False),
    lora_targets=_ATTENTION + _LINEAR + _SMALL + _MLP,
    default_target_modules=_ATTENTION + _LINEAR + _MLP,
    handler="lockstep.models.qwen3_5.handler:dense",
    native_vllm_lora_status="validated",
    dependency_floors=_FLOORS,
    skipped=_SKIPPED,
    tool_call_parser="qwen3_coder",
    server=_SERVER,
    evidence="docs/models/qwen3_5.md",
)

MOE = ModelSupportSpec(
    key="qwen3_5_moe",
    family="qwen3_5",
    model_names=(
        "Qwen/Qwen3.5-35B-A3B",
        "Qwen/Qwen3.5-35B-A3B-Base",
        "Qwen/Qwen3.5-122B-A10B",
        "Qwen/Qwen3.5-397B-A17B",
        "Qwen/Qwen3.6-35B-A3B",
    ),
    architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    is_moe=True,
    traits=_traits(moe=True),
    lora_targets=(*_ATTENTION, *_LINEAR, *_SMALL, *_MLP, "experts"),
    default_target_modules=(*_ATTENTION, *_LINEAR, *_MLP, "experts"),
    handler="lockstep.models.qwen3_5.handler:moe",
    native_vllm_lora_status="validated",
    dependency_floors=_FLOORS,
    skipped=_SKIPPED,
    tool_call_parser="qwen3_coder",
    server=_SERVER,
    evidence="docs/models/qwen3_5.md",
)

SPECS = (DENSE, MOE)
