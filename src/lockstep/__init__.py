"""Lockstep: reinforcement-learning post-training of LLM agents. The policy that is trained is the
policy that was sampled.

Names are resolved on first use, so that `import lockstep` costs nothing and loads no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.backends.base import Backend, Endpoint, TrainResult
    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.backends.tinker.backend import TinkerBackend
    from lockstep.config.lora import LoraConfig
    from lockstep.config.megatron import MegatronConfig, Parallel, Placement
    from lockstep.config.pipeline import PipelineConfig
    from lockstep.config.sft import SFTConfig
    from lockstep.config.train import TrainConfig
    from lockstep.errors import LockstepError
    from lockstep.gateway.other_model import OtherModel
    from lockstep.loop.pipeline.trainer import PipelineTrainer
    from lockstep.model import TrainableModel
    from lockstep.rollouts.gather import gather_trajectory_groups
    from lockstep.rollouts.judge import Judge
    from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup

__version__ = "0.1.0"

_HOME = {
    "Backend": "lockstep.backends.base",
    "Endpoint": "lockstep.backends.base",
    "Judge": "lockstep.rollouts.judge",
    "LockstepError": "lockstep.errors",
    "LoraConfig": "lockstep.config.lora",
    "MegatronConfig": "lockstep.config.megatron",
    "MegatronBackend": "lockstep.backends.megatron.backend",
    "OtherModel": "lockstep.gateway.other_model",
    "Parallel": "lockstep.config.megatron",
    "Placement": "lockstep.config.megatron",
    "PipelineConfig": "lockstep.config.pipeline",
    "PipelineTrainer": "lockstep.loop.pipeline.trainer",
    "SFTConfig": "lockstep.config.sft",
    "TinkerBackend": "lockstep.backends.tinker.backend",
    "TrainConfig": "lockstep.config.train",
    "TrainResult": "lockstep.backends.base",
    "TrainableModel": "lockstep.model",
    "Trajectory": "lockstep.rollouts.trajectory",
    "TrajectoryGroup": "lockstep.rollouts.trajectory",
    "gather_trajectory_groups": "lockstep.rollouts.gather",
}

__all__ = [
    "Backend",
    "Endpoint",
    "Judge",
    "LockstepError",
    "LoraConfig",
    "MegatronBackend",
    "MegatronConfig",
    "OtherModel",
    "Parallel",
    "PipelineConfig",
    "PipelineTrainer",
    "Placement",
    "SFTConfig",
    "TinkerBackend",
    "TrainConfig",
    "TrainResult",
    "TrainableModel",
    "Trajectory",
    "TrajectoryGroup",
    "gather_trajectory_groups",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
