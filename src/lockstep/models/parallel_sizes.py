"""Whether parallel sizes divide a model: everything that the trainer would refuse at its start, from the config alone."""

from __future__ import annotations

from lockstep.config.megatron import Parallel
from lockstep.errors import ConfigError
from lockstep.models.config import ModelConfig
from lockstep.models.contract import Sizes
from lockstep.models.layout_rules import check_sizes


def check_parallel(config: ModelConfig, parallel: Parallel) -> None:
    """Raise ConfigError naming the first dimension of the model that `parallel` doesn't divide."""
    check_sizes(config, Sizes(tp=parallel.tensor, ep=parallel.expert, etp=parallel.expert_tensor, pp=parallel.pipeline))
    check_heads(config, parallel)


def check_heads(config: ModelConfig, parallel: Parallel) -> None:
    """Raise ConfigError unless every kind of head of this model can be distributed over the context ranks."""
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
