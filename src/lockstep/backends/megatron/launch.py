"""What a trainer and a server are started with, and starting them side by side."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lockstep.backends.megatron.placement import Devices, resolve_placement
from lockstep.batching.routed_experts import RouteShape
from lockstep.config.lora import LoraConfig
from lockstep.config.megatron import Parallel
from lockstep.errors import ConfigError, StoreError
from lockstep.inference.client import Server
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.environment.locate import Runtime
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.inference.parsers import ToolCalls, resolve_tool_calls
from lockstep.inference.tokenizer_files import read_tokenizer
from lockstep.models.checkpoint.hub import checkpoint_folder
from lockstep.models.registry import get_model_support_spec, load_model_config
from lockstep.runs.store import read_settings, read_step
from lockstep.trainer.client import Trainer
from lockstep.trainer.protocol import EngineConfig, LoraSettings, Memory, Offload, Release

if TYPE_CHECKING:
    from lockstep.models.config import ModelConfig
    from lockstep.models.spec import ModelSupportSpec

_OFFLOAD_DEADLINE_S = 600.0
_LEAST_SHARE = 0.1
_SERVED_LENGTH = 2048
"""Tokens of the longest conversation with a step of a run that did not store its own length."""


@dataclass(frozen=True)
class Parts:
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
    """Shared mode: the trainer's memory goes to the host while the server serves."""
    routes: RouteShape | None
    """What each choice's expert routes look like; None: none are captured or replayed."""
    seed: int
    recompute: bool | None
    max_model_len: int
    max_num_seqs: int
    """Sequences that the server takes at once."""
    kv_cache_bytes: int | None
    """Of a CPU server; None: what the GPU has left."""
    tools: ToolCalls
    """Which parser reads tool calls, or why there is none."""
    server_args: tuple[str, ...]
    """Further arguments of vLLM's command line."""
    transport: str
    """How weights and adapters travel from the trainer's memory to the server."""
    exact: bool
    """Trainer and server compute the fp32 weights in fp64."""
    server_start: int = 0
    """How many servers this run had before."""

    @property
    def shared(self) -> bool:
        return self.devices.shared

    def engine_config(self) -> EngineConfig:
        lora, targets = self.lora, self.spec.default_target_modules
        return EngineConfig(
            model=str(self.base),
            dtype="float64" if self.exact else self.dtype,
            parallel=self.parallel,
            lora=lora and LoraSettings(lora.rank, lora.alpha, lora.target_modules or targets),
            seed=self.seed,
            recompute=self.recompute,
        )

    def server_config(self, served_name: str, gpu_memory_utilization: float = 0.9) -> ServerConfig:
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
            capture_routes=self.routes is not None,
            gpus=self.devices.inference,
            gpu_memory_utilization=gpu_memory_utilization,
            sleeps=self.shared,
            seed=sampling_seed(self.seed, self.server_start),
            exact=self.exact,
            # Packed, they could not be read back, and so not be verified.
            plain_weights=self.merged and not self.devices.inference,
            extra_args=self.server_args,
        )


def sampling_seed(seed: int, server_start: int) -> int:
    """The seed of a server's sampling. Each server of a run draws other noise: one that begins anew with the seed of the one before
    samples the same replies again, and what ended that server ends the next one, too.
    """
    return seed if server_start == 0 else zlib.crc32(f"{seed} {server_start}".encode()) >> 1  # vLLM takes 31 bits


def lora_serving(lora: LoraConfig, spec: ModelSupportSpec) -> LoraServing:
    return LoraServing(max_rank=lora.rank, targets=lora.target_modules or spec.default_target_modules)


def route_shape(config: ModelConfig) -> RouteShape | None:
    """The expert routes of a model, which has them in its mixture-of-experts layers only; None for a dense one."""
    return RouteShape(sum(config.moe_layers), config.experts_per_token, config.experts) if config.is_moe else None


def start_trainer(parts: Parts, folder: Path) -> Awaitable[Trainer]:
    """folder: of the run, for the log."""
    log, processes = folder / "logs" / "trainer.log", parts.parallel.processes
    return Trainer.start(parts.engine_config(), processes, log, gpus=parts.devices.trainer)


async def start_both(
    parts: Parts, served_name: str, runtime: Runtime, folder: Path, say: Callable[[str], None]
) -> tuple[Trainer, Server]:
    """Trainer and server: (trainer, server). The caller closes them.

    folder: of the run, for the logs. If one fails to start, the other is closed and the error raised.
    """
    if parts.shared:
        return await _start_in_turn(parts, served_name, runtime, folder, say)
    starting = (
        asyncio.ensure_future(start_trainer(parts, folder)),
        asyncio.ensure_future(launch(parts.server_config(served_name), runtime, folder, say)),
    )
    try:
        return await asyncio.gather(*starting)
    except BaseException:
        for task in starting:
            task.cancel()
        ended = await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(thing.close() for thing in ended if not isinstance(thing, BaseException)))
        raise


async def _start_in_turn(
    parts: Parts, served_name: str, runtime: Runtime, folder: Path, say: Callable[[str], None]
) -> tuple[Trainer, Server]:
    """On the same GPUs: the trainer first, so that the server takes its share of what the trainer leaves free (vLLM measures the
    device while it starts, and nothing may change meanwhile).
    """
    say("starting the trainer")
    trainer = await start_trainer(parts, folder)
    try:
        if parts.offload:
            await trainer.call(Offload(), deadline_s=_OFFLOAD_DEADLINE_S)
        else:
            await trainer.call(Release(), deadline_s=_OFFLOAD_DEADLINE_S)
        memory = await trainer.call(Memory(), deadline_s=_OFFLOAD_DEADLINE_S)
        share = memory_share(memory.device_free, memory.device_total)
        return trainer, await launch(parts.server_config(served_name, share), runtime, folder, say)
    except BaseException:
        await trainer.close()
        raise


def memory_share(free: int, total: int) -> float:
    """The part of the GPU's memory (`total` bytes) for a server that shares it, when `free` bytes are: nine tenths of them.

    The rest is for what the trainer's process grows by outside of its tensors (NCCL, cuBLAS). 0.9 where nothing is known (a CPU). Raises
    ConfigError when too little is left to serve anything. Unproven on a GPU.
    """
    if total == 0:
        return 0.9
    share = int(90 * free / total) / 100
    if share < _LEAST_SHARE:
        raise ConfigError(
            f"shared mode: the trainer leaves {free / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB to the server, too little: "
            "use offload = True, a smaller model, or GPUs of their own"
        )
    return share


async def serve_step(run_path: Path, step: int | None, progress: Callable[[str], None]) -> tuple[Server, str]:
    """A server with a published step, without a trainer: (server, "name@step"). The caller closes it.

    A run of adapters serves base model and adapter, a run of all weights the model that the step holds.

    run_path: PATH/PROJECT/NAME. Raises StoreError for a folder that is no run or a step that isn't published.
    """
    identity, found = read_step(run_path, step)
    if identity.get("backend") == "tinker":
        raise StoreError(f"{run_path} was trained by TinkerBackend: its weights are with the service, not here")
    base = checkpoint_folder(identity["base_model"])
    spec = get_model_support_spec(str(base))
    devices, lora, name = resolve_placement(None), identity["lora"], f"{run_path.name}@{found.number}"
    settings = read_settings(run_path)
    server_args = tuple(settings.get("server_args", ()))
    parser = settings.get("tool_call_parser")  # of an older run nothing is known: the family's
    tools = resolve_tool_calls(parser, spec.tool_call_parser, read_tokenizer(base, server_args), server_args)
    config = ServerConfig(
        model=base if lora else found.path / "model",
        served_name=f"{run_path.name}@base" if lora else name,
        dtype=identity["dtype"],
        lora=lora_serving(LoraConfig(**lora), spec) if lora else None,
        max_model_len=settings.get("max_model_len") or min(_SERVED_LENGTH, load_model_config(str(base)).max_positions),
        max_num_seqs=settings.get("max_num_seqs", 64),
        kv_cache_bytes=settings.get("kv_cache_bytes") if devices.kind == "cpu" else None,
        tool_call_parser=tools.parser,
        tools_off=tools.off,
        gpus=devices.inference,
        extra_args=server_args,
    )
    server = await launch(config, find_runtime(devices.kind), run_path, progress)
    if lora is None:
        return server, name
    try:
        await server.load_adapter(name, found.adapter)
    except BaseException:
        await server.close()
        raise
    return server, name
