"""The promise of `numerics="exact"`, and its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.config.base import unsupported
from lockstep.config.train import TrainConfig

if TYPE_CHECKING:
    from lockstep.backends.megatron.plan.placement import Devices
    from lockstep.models.config import ModelConfig
    from lockstep.models.spec import ModelSupportSpec

EXACT_TOLERANCE = 1e-6
"""Nats per token between trainer and server. Both sides compute fp32 weights in fp64. They differ
only by rounding the server's reported number to fp32. Half a unit in the last place is 4.8e-7 below
16 nats; where it exceeds 1e-6, it is the limit.
"""


def check_exact(
    spec: ModelSupportSpec, config: ModelConfig, dtype: str, rollout_weights_mode: str, devices: Devices
) -> None:
    """Raise ConfigError, with the reason, for a model or a setting for which server and trainer
    can't agree exactly.
    """

    def refuse(why: str) -> None:
        raise unsupported("numerics", "exact", "MegatronBackend", why)

    if devices.kind == "cuda":
        refuse("it is for the CPU; on GPUs the two programs' kernels round differently (docs/numerics.md)")
    if "linear_attention" in config.layer_types:
        refuse(f"{spec.key} has GatedDeltaNet layers, which vLLM computes in bfloat16 only on a CPU")
    if dtype != "float32":
        refuse(f"the weights are {dtype}; leave dtype out, or set it to float32")
    if rollout_weights_mode != "lora":
        refuse("merging rounds the weights that the server gets; use rollout_weights_mode 'lora'")


def exact_config(config: TrainConfig) -> TrainConfig:
    """`config` with the promise's limit on every token, or the user's own if it is tighter."""
    limit = min(config.max_token_mismatch or EXACT_TOLERANCE, EXACT_TOLERANCE)
    return config.model_copy(update={"max_token_mismatch": limit})
