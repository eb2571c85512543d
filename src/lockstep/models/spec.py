"""A family's facts, readable before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RolloutWeightsMode = Literal["lora", "merged"]
NativeLoraStatus = Literal["disabled", "wip", "validated"]
LayerKind = Literal["full_attention", "linear_attention"]


@dataclass(frozen=True)
class DependencyFloor:
    """The lowest version of an installed distribution that this family works with, and why."""

    distribution: str
    minimum: str
    reason: str


@dataclass(frozen=True)
class Traits:
    """The facts of a family that no field of `config.json` gives.

    Values of the config that contradict a trait are refused when the config is read.
    """

    qk_norm: bool = False
    output_gate: bool = False
    zero_centered_norm: bool = False
    partial_rotary: float = 1.0
    """Share of each head that is rotated where the config is silent."""
    head_dim_from_hidden: bool = False
    """True: a config without `head_dim` means hidden_size / num_attention_heads."""
    rope_types: tuple[str, ...] = ("default",)
    layer_kinds: tuple[LayerKind, ...] = ("full_attention",)
    full_attention_interval: int = 1
    """For configs without layer types: every n-th layer is full attention."""
    norm_topk_prob: bool | None = None
    """MoE: True when the family always normalises the chosen experts' probabilities; None when the
    config says.
    """
    fused_expert_lora: bool = False
    """MoE: gate and up of a routed expert share one LoRA A (the stacked PEFT layout) instead of
    having one each.
    """


@dataclass(frozen=True)
class ServerFacts:
    """Facts about a family's models that vLLM doesn't find out by itself.

    arguments: (architecture, argument of the command line).
    lora_arguments: the same, where adapters are served.
    one_token_prompts_on_cpu: False where its CPU build dies of a prompt of one token.
    own_block_size_on_cpu: the model chooses the KV cache's block size itself.
    """

    arguments: tuple[tuple[str, str], ...] = ()
    lora_arguments: tuple[tuple[str, str], ...] = ()
    one_token_prompts_on_cpu: bool = True
    own_block_size_on_cpu: bool = False


@dataclass(frozen=True)
class ModelSupportSpec:
    """One model family as users, the registry and the command line see it.

    handler: "module:attribute", imported on first use.
    skipped: (tensor name prefix, reason) of checkpoint tensors that are carried over untouched
        instead of being trained.
    evidence: where the validation of this family is documented.
    """

    key: str
    family: str
    model_names: tuple[str, ...]
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    is_moe: bool
    traits: Traits
    lora_targets: tuple[str, ...]
    default_target_modules: tuple[str, ...]
    handler: str
    default_rollout_weights_mode: RolloutWeightsMode = "lora"
    native_vllm_lora_status: NativeLoraStatus = "wip"
    dependency_floors: tuple[DependencyFloor, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    tool_call_parser: str = "hermes"
    """vLLM's name of the parser for this family's tool calls."""
    server: ServerFacts = ServerFacts()
    evidence: str = ""
