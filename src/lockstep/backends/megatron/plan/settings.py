"""Everything a run is started from, resolved."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lockstep.backends.megatron.plan.placement import Devices
from lockstep.batching.pack import MOST_ROW_LENGTH
from lockstep.batching.routed_experts import RoutedExpertsShape
from lockstep.config.lora import LoraConfig
from lockstep.config.megatron import Parallel
from lockstep.inference.launch import LoraServing, ServerConfig
from lockstep.inference.parsers import ToolCalls
from lockstep.trainer.protocol import EngineConfig, LoraSettings

if TYPE_CHECKING:
    from lockstep.models.config import ModelConfig
    from lockstep.models.spec import ModelSupportSpec


@dataclass(frozen=True)
class ResolvedSettings:
    """Everything a run is started from, resolved: no default is left to fill in."""

    base: Path
    spec: ModelSupportSpec
    lora: LoraConfig | None
    merged: bool
    """The server holds the trained weights as its base model's, and no adapters."""
    dtype: Literal["float32", "bfloat16"]
    parallel: Parallel
    devices: Devices
    offload: bool
    """Colocated mode: the trainer's memory goes to the host while the server serves."""
    vocabulary: int
    """The number of token ids of the model."""
    routed_experts: RoutedExpertsShape | None
    """The shape of each choice's routed experts; None: none are captured or replayed."""
    seed: int
    recompute: bool | None
    max_model_len: int
    max_num_seqs: int
    """Sequences that the server takes at once."""
    kv_cache_bytes: int | None
    """Of a CPU server; None: what the GPU has left."""
    tools: ToolCalls
    """The parser that reads tool calls, or the reason why there is none."""
    server_args: tuple[str, ...]
    """Further arguments of vLLM's command line."""
    transport: str
    """The transport of weights and adapters from the trainer's memory to the server."""
    exact: bool
    """Trainer and server compute the fp32 weights in fp64."""
    row_limit: int = MOST_ROW_LENGTH
    """Tokens that a packed row may grow to, where the user left its length open."""
    server_start: int = 0
    """The number of servers this run had before."""

    @property
    def colocated(self) -> bool:
        return self.devices.colocated

    def engine_config(self) -> EngineConfig:
        lora, targets = self.lora, self.spec.default_target_modules
        return EngineConfig(
            model=str(self.base),
            dtype="float64" if self.exact else self.dtype,
            parallel=self.parallel,
            lora=lora and LoraSettings(lora.rank, lora.applied_alpha, lora.target_modules or targets),
            seed=self.seed,
            recompute=self.recompute,
        )

    def server_config(self, served_name: str, gpu_memory_utilization: float = 0.9, replica: int = 0) -> ServerConfig:
        """replica: the server's place among the run's servers, from 0."""
        replicas = len(self.devices.servers)
        # Each server of a CPU has its part of the cores.
        shared = replicas > 1 and "OMP_NUM_THREADS" not in os.environ
        return ServerConfig(
            model=self.base,
            served_name=served_name,
            dtype=self.dtype,
            lora=lora_serving(self.lora, self.spec) if self.lora and not self.merged else None,
            tool_call_parser=self.tools.parser,
            tools_off=self.tools.off,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            kv_cache_bytes=self.kv_cache_bytes,
            capture_routed_experts=self.routed_experts is not None,
            gpus=self.devices.servers[replica],
            threads=max(1, (os.cpu_count() or 1) // replicas) if shared else None,
            gpu_memory_utilization=gpu_memory_utilization,
            sleeps=self.colocated,
            seed=sampling_seed(self.seed, self.server_start, replica),
            exact=self.exact,
            # Packed, they could not be read back, and so not be verified.
            plain_weights=self.merged and not self.devices.inference,
            extra_args=self.server_args,
        )


def sampling_seed(seed: int, server_start: int, replica: int = 0) -> int:
    """The seed of a server's sampling. Each server of a run draws other noise. With the seed of the
    server before, a new server would sample the same replies again, and the failure would repeat.
    """
    if server_start == replica == 0:
        return seed
    words = f"{seed} {server_start}" + (f" {replica}" if replica else "")
    return zlib.crc32(words.encode()) >> 1  # vLLM takes 31 bits


def lora_serving(lora: LoraConfig, spec: ModelSupportSpec) -> LoraServing:
    return LoraServing(max_rank=lora.rank, targets=lora.target_modules or spec.default_target_modules)


def routed_experts_shape(config: ModelConfig) -> RoutedExpertsShape | None:
    """The routed experts of a model, which has them in its mixture-of-experts layers only; None for
    a dense one.
    """
    return (
        RoutedExpertsShape(sum(config.moe_layers), config.experts_per_token, config.experts) if config.is_moe else None
    )
