"""Memory of activations by the sizes of a model: the needs of a layer's backward pass, and the
longest row that memory carries.
"""

from __future__ import annotations

from lockstep.models.config import ModelConfig

MARGIN = 1.4
"""Estimates are multiplied by this: temporaries, and memory the allocator can't use."""
_STATE_CHUNK = 64
"""Tokens per chunk of the GatedDeltaNet kernels; they keep one state per chunk."""


def kept_elements(config: ModelConfig, layer: int, tensor: int) -> int:
    """Elements per token that the backward pass of layer `layer` needs on one of `tensor` ranks
    when nothing is recomputed.
    """
    mixer, mlp = mixer_elements(config, layer), mlp_elements(config, layer)
    return 6 * config.hidden_size + (mixer + mlp) // tensor


def mixer_elements(config: ModelConfig, layer: int) -> int:
    """The part of a layer's attention, or of its GatedDeltaNet, on all ranks."""
    if config.layer_types[layer] == "linear_attention":
        keys, values = (
            config.linear_key_heads * config.linear_key_dim,
            config.linear_value_heads * config.linear_value_dim,
        )
        states = config.linear_value_heads * config.linear_key_dim * config.linear_value_dim // _STATE_CHUNK
        return 4 * (2 * keys + 2 * values) + 2 * states
    queries = config.heads * config.head_dim
    return 3 * (queries * (2 if config.output_gate else 1) + 2 * config.kv_heads * config.head_dim) + 2 * queries


def mlp_elements(config: ModelConfig, layer: int) -> int:
    """The part of a layer's MLP, or of its experts, on all ranks."""
    if config.moe_layers[layer]:
        experts = config.experts_per_token * (4 * config.expert_size + 3 * config.hidden_size)
        return experts + 4 * config.shared_expert_size
    return 4 * config.mlp_size


def layers_that_fit(bytes_per_layer: list[int], available: int) -> int:
    """The number of last layers that may keep their activations in `available` bytes, while one
    more layer is recomputed.
    """
    spare = available - max(bytes_per_layer)
    count = 0
    for size in reversed(bytes_per_layer):
        spare -= size
        if spare < 0:
            break
        count += 1
    return count


def row_tokens(config: ModelConfig, width: int, tensor: int, free: int) -> int:
    """Tokens of the longest row that `free` bytes of one rank carry when every layer is recomputed.

    width: bytes of an element.
    tensor: ranks that a layer is split over.
    """
    inputs = config.layers * config.hidden_size
    layer = max(kept_elements(config, number, tensor) for number in range(config.layers))
    return max(free, 0) // int(width * (inputs + 4 * config.hidden_size + MARGIN * layer))
