"""Llama 3 as the registry sees it."""

from __future__ import annotations

from lockstep.models.spec import DependencyFloor, ModelSupportSpec, Traits

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SPECS = (
    ModelSupportSpec(
        key="llama3",
        family="llama",
        model_names=(
            *(f"meta-llama/Meta-Llama-3-{size}{kind}" for size in ("8B", "70B") for kind in ("", "-Instruct")),
            *(f"meta-llama/Llama-3.1-{size}{kind}" for size in ("8B", "70B") for kind in ("", "-Instruct")),
            *(f"meta-llama/Llama-3.2-{size}{kind}" for size in ("1B", "3B") for kind in ("", "-Instruct")),
            "meta-llama/Llama-3.3-70B-Instruct",
            *(f"HuggingFaceTB/SmolLM2-{size}{kind}" for size in ("135M", "360M", "1.7B") for kind in ("", "-Instruct")),
        ),
        architectures=("LlamaForCausalLM",),
        model_types=("llama",),
        is_moe=False,
        traits=Traits(head_dim_from_hidden=True, rope_types=("default", "llama3")),
        lora_targets=_TARGETS,
        default_target_modules=_TARGETS,
        handler="lockstep.models.llama.handler:dense",
        native_vllm_lora_status="validated",
        dependency_floors=(DependencyFloor("megatron-core", "0.16", "local layer specs without TransformerEngine"),),
        tool_call_parser="llama3_json",
        evidence="docs/models/llama.md",
    ),
)
