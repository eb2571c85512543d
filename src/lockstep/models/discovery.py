"""The parts of a model, from its `config.json` alone: kinds of layers, a short version that has
them all, and open risks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.models.config import ModelConfig
from lockstep.models.registry import get_model_support_spec, load_model_config
from lockstep.models.spec import ModelSupportSpec


@dataclass(frozen=True)
class LayerFamily:
    """One kind of layer: `full_attention+moe`, `linear_attention+dense`, ...; how many there are,
    and the first one's number.
    """

    key: str
    count: int
    first_layer: int


@dataclass(frozen=True)
class ArchitectureReport:
    """Result of `inspect_architecture`.

    minimum_layers: the fewest leading layers of the model that contain every kind.
    unresolved_risks: what nobody has checked for this model, one sentence each; empty for a
        validated model whose config holds nothing unknown.
    """

    base_model: str
    family: str
    layer_families: tuple[LayerFamily, ...]
    minimum_layers: int
    unresolved_risks: tuple[str, ...]


def inspect_architecture(base_model: str, *, allow_unvalidated_arch: bool = False) -> ArchitectureReport:
    """Describe a local checkpoint folder or a Hugging Face id (only its config is fetched).

    Raises UnsupportedModelError as the registry and the config reader do.
    """
    spec = get_model_support_spec(base_model, allow_unvalidated_arch=allow_unvalidated_arch)
    config = load_model_config(base_model, allow_unvalidated_arch=allow_unvalidated_arch)
    families = layer_families(config)
    return ArchitectureReport(
        base_model, spec.key, families, max(f.first_layer for f in families) + 1, unresolved_risks(spec, config)
    )


def layer_families(config: ModelConfig) -> tuple[LayerFamily, ...]:
    """The kinds of layers in order of first appearance."""
    kinds = [
        f"{mixer}+{'moe' if moe else 'dense'}" for mixer, moe in zip(config.layer_types, config.moe_layers, strict=True)
    ]
    return tuple(LayerFamily(kind, kinds.count(kind), kinds.index(kind)) for kind in dict.fromkeys(kinds))


def unresolved_risks(spec: ModelSupportSpec, config: ModelConfig) -> tuple[str, ...]:
    """The parts that the contract does not cover or nobody has validated."""
    risks = []
    if config.architecture not in spec.architectures:
        risks.append(f"architecture {config.architecture} is not validated; it is treated as {spec.key}")
    if spec.native_vllm_lora_status != "validated":
        risks.append(f"adapters of {spec.key} served by vLLM are {spec.native_vllm_lora_status}, not validated")
    risks += [f"config field {name} is unknown and ignored" for name in config.unknown_fields]
    return tuple(risks)
