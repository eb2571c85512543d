"""Divisibility of a model by parallel sizes: everything that the trainer would refuse at its start,
from the config alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lockstep.errors import ConfigError
from lockstep.models.config import ModelConfig
from lockstep.models.contract import Sizes

if TYPE_CHECKING:
    from lockstep.config.megatron import Parallel


def check_parallel(config: ModelConfig, parallel: Parallel) -> None:
    """Raise ConfigError naming the first dimension of the model that `parallel` doesn't divide."""
    check_sizes(config, Sizes(tp=parallel.tensor, ep=parallel.expert, etp=parallel.expert_tensor, pp=parallel.pipeline))
    check_heads(config, parallel)


def check_heads(config: ModelConfig, parallel: Parallel) -> None:
    """Raise ConfigError unless every kind of head of this model can be distributed over the context
    ranks.
    """
    if parallel.context == 1:
        return
    counts = {"num_attention_heads": config.heads}
    if "linear_attention" in config.layer_types:
        counts |= {"linear_num_key_heads": config.linear_key_heads, "linear_num_value_heads": config.linear_value_heads}
    ranks = parallel.tensor * parallel.context
    for name, heads in counts.items():
        if heads % ranks:
            raise ConfigError(
                f"parallel.tensor x parallel.context = {ranks} does not divide {name} = {heads}, and context parallelism splits heads; "
                "choose a smaller context size"
            )


def check_sizes(config: ModelConfig, sizes: Sizes) -> None:
    """Raise ConfigError naming the first dimension that the parallel sizes don't divide.

    TP beyond the KV heads needs a whole number of ranks per KV head.
    """
    _divides("tensor", sizes.tp, "num_attention_heads", config.heads)
    if config.kv_heads % sizes.tp and sizes.tp % config.kv_heads:
        raise ConfigError(
            f"tensor={sizes.tp} and num_key_value_heads={config.kv_heads}: "
            "one must divide the other; choose another tensor size"
        )
    fused = (config.heads * (2 if config.output_gate else 1) + 2 * config.kv_heads) * config.head_dim
    _divides("tensor", sizes.tp, "the rows of queries, gates, keys and values", fused)
    _divides("tensor", sizes.tp, "intermediate_size", config.mlp_size)
    _divides("tensor", sizes.tp, "shared_expert_intermediate_size", config.shared_expert_size)
    _divides("tensor", sizes.tp, "linear_num_key_heads", config.linear_key_heads)
    _divides("tensor", sizes.tp, "linear_num_value_heads", config.linear_value_heads)
    if not config.is_moe and (sizes.ep, sizes.etp) != (1, 1):
        raise ConfigError(f"expert={sizes.ep}, expert_tensor={sizes.etp}: {config.key} has no experts; leave both at 1")
    _divides("expert", sizes.ep, "num_experts", config.experts)
    _divides("expert_tensor", sizes.etp, "moe_intermediate_size", config.expert_size)
    if sizes.pp > config.layers:
        raise ConfigError(f"pipeline={sizes.pp} exceeds num_hidden_layers={config.layers}; use fewer stages")


def _divides(size_name: str, size: int, name: str, value: int) -> None:
    if value % size:
        raise ConfigError(f"{size_name}={size} does not divide {name}={value}; choose a {size_name} size that does")


def stage_layers(layers: int, pipeline: int, counts: Sequence[int] | None = None) -> list[range]:
    """Layer range of every pipeline stage: `counts` layers each, or as even as possible with the
    longer stages first.

    Raises ConfigError when the counts don't add up or a stage would be empty.
    """
    if counts is None:
        counts = [layers // pipeline + (i < layers % pipeline) for i in range(pipeline)]
    if len(counts) != pipeline or sum(counts) != layers or min(counts) < 1:
        raise ConfigError(
            f"pipeline stages of {list(counts)} layers don't make {layers} layers in {pipeline} non-empty stages"
        )
    starts = [sum(counts[:i]) for i in range(pipeline)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
