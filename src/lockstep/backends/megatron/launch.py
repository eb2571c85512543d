"""The settings that a trainer and a server start with, and starting both side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from lockstep.backends.megatron.plan.placement import resolve_placement
from lockstep.backends.megatron.plan.settings import ResolvedSettings, lora_serving
from lockstep.config import deadlines
from lockstep.config.lora import LoraConfig
from lockstep.errors import ConfigError, StoreError
from lockstep.inference.client import Server
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.environment.locate import Runtime
from lockstep.inference.launch import ServerConfig, launch
from lockstep.inference.parsers import resolve_tool_calls
from lockstep.inference.tokenizer_files import read_tokenizer
from lockstep.inference.watch import watch
from lockstep.models.checkpoint.hub import checkpoint_folder
from lockstep.models.registry import get_model_support_spec, load_model_config
from lockstep.process.patience import Patience
from lockstep.runs.checkpoint import RunCheckpoint
from lockstep.runs.database import read_settings
from lockstep.runs.retention import reading
from lockstep.runs.store import read_checkpoint
from lockstep.trainer.client import Trainer
from lockstep.trainer.protocol import Memory, Offload, Release

_LEAST_SHARE = 0.1
_SERVED_LENGTH = 2048
"""Tokens of the longest conversation with a step of a run that did not store its own length."""

_STEP_TOKENS = 2048
"""Tokens that vLLM computes in one step on a CPU, at most."""
_CPU_OPERATIONS = 1e10
"""Floating-point operations a second of a slow, busy CPU."""


def start_trainer(settings: ResolvedSettings, folder: Path) -> Awaitable[Trainer]:
    """folder: of the run, for the log."""
    log, processes = folder / "logs" / "trainer.log", settings.parallel.processes
    return Trainer.start(settings.engine_config(), processes, log, gpus=settings.devices.trainer)


async def start_server(
    settings: ResolvedSettings,
    served_name: str,
    runtime: Runtime,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    *,
    share: float = 0.9,
    replica: int = 0,
) -> Server:
    """A server that is watched over: one that hangs is ended.

    share: of a GPU's memory.
    replica: the server's place among the run's servers, from 0.
    """
    config = settings.server_config(served_name, share, replica)
    log = f"server-{replica + 1}.log" if replica else "server.log"
    server = await launch(config, runtime, folder, say, log, replica)
    # A GPU's first kernels are compiled, and Triton's interpreter takes seconds for a step.
    slow = settings.devices.kind != "cpu" or settings.exact or settings.routed_experts is not None
    floor_s = deadlines.SILENT_S if slow else deadlines.HUNG_S
    if settings.devices.kind == "cpu":
        floor_s = max(floor_s, longest_step_s(settings.base))
    watch(server, Patience(floor_s))
    return server


def longest_step_s(base: Path) -> float:
    """Seconds that a server on a CPU may need for one step of its engine: two operations for each
    parameter and token.

    base: the model's folder; its files' sizes say how many parameters there are, 2 bytes each.
    """
    parameters = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2
    return 2 * parameters * _STEP_TOKENS / _CPU_OPERATIONS


async def start_both(
    settings: ResolvedSettings, served_name: str, runtime: Runtime, folder: Path, say: Callable[[str], None]
) -> tuple[Trainer, list[Server]]:
    """Trainer and servers: (trainer, servers). The caller closes them.

    folder: of the run, for the logs. If one fails to start, the other is closed and the error
        raised.
    """
    if settings.colocated:
        return await _start_in_turn(settings, served_name, runtime, folder, say)
    trainer = asyncio.ensure_future(start_trainer(settings, folder))
    servers = [
        asyncio.ensure_future(start_server(settings, served_name, runtime, folder, say, replica=replica))
        for replica in range(len(settings.devices.servers))
    ]
    starting = (trainer, *servers)
    try:
        await asyncio.gather(*starting)
        return trainer.result(), [server.result() for server in servers]
    except BaseException:
        for task in starting:
            task.cancel()
        ended = await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(thing.close() for thing in ended if not isinstance(thing, BaseException)))
        raise


async def _start_in_turn(
    settings: ResolvedSettings, served_name: str, runtime: Runtime, folder: Path, say: Callable[[str], None]
) -> tuple[Trainer, list[Server]]:
    """On the same GPUs the trainer starts first, so that the server takes its share of the
    remaining free memory. vLLM measures the device while it starts, and nothing may change
    meanwhile.
    """
    say("starting the trainer")
    trainer = await start_trainer(settings, folder)
    try:
        if settings.offload:
            await trainer.call(Offload(), deadline_s=deadlines.OFFLOAD_S)
        else:
            await trainer.call(Release(), deadline_s=deadlines.OFFLOAD_S)
        memory = await trainer.call(Memory(), deadline_s=deadlines.OFFLOAD_S)
        share = memory_share(memory.device_free, memory.device_total)
        return trainer, [await start_server(settings, served_name, runtime, folder, say, share=share)]
    except BaseException:
        await trainer.close()
        raise


def memory_share(free: int, total: int) -> float:
    """The part of the GPU's memory (`total` bytes) for a server that shares it, when `free` bytes
    are: nine tenths of them.

    The rest is for what the trainer's process grows by outside of its tensors (NCCL, cuBLAS). 0.9
    where nothing is known (a CPU). Raises ConfigError when too little is left to serve anything.
    """
    if total == 0:
        return 0.9
    share = int(90 * free / total) / 100
    if share < _LEAST_SHARE:
        raise ConfigError(
            f"colocated mode: the trainer leaves {free / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB to the server, too little: "
            "use offload = True, a smaller model, or GPUs of their own"
        )
    return share


async def serve_step(run_path: Path, step: int | None, progress: Callable[[str], None]) -> tuple[Server, str]:
    """A server with a published step, without a trainer: (server, "name@step"). The caller closes
    it.

    A run of adapters serves base model and adapter, a run of all weights the model that the step
    holds.

    run_path: PATH/PROJECT/NAME.

    Raises StoreError for a folder that is not a run or a step that isn't published.
    """
    config, checkpoint = serving_of(run_path, step)
    name = f"{run_path.name}@{checkpoint.number}"
    kind = resolve_placement(None).kind
    with reading(checkpoint):
        server = await launch(config, find_runtime(kind), run_path, progress, "chat.log")
        if config.lora is None:
            return server, name
        try:
            await server.load_adapter(name, checkpoint.adapter)
        except BaseException:
            await server.close()
            raise
        return server, name


def serving_of(run_path: Path, step: int | None) -> tuple[ServerConfig, RunCheckpoint]:
    """The settings that a published step is served with, and the step itself.

    The settings are those that the run was started with last.
    Raises what `serve_step` does, before anything is started.
    """
    identity, checkpoint = read_checkpoint(run_path, step)
    if identity.get("backend") == "tinker":
        raise StoreError(f"{run_path} was trained by TinkerBackend: its weights are with the service, not here")
    base = checkpoint_folder(identity["base_model"])
    spec = get_model_support_spec(str(base))
    devices, lora = resolve_placement(None), identity["lora"]
    settings = read_settings(run_path)
    server_args = tuple(settings.get("server_args", ()))
    parser = settings.get("tool_call_parser")  # of an older run nothing is known: the family's
    tools = resolve_tool_calls(parser, spec.tool_call_parser, read_tokenizer(base, server_args), server_args)
    config = ServerConfig(
        model=base if lora else checkpoint.path / "model",
        served_name=f"{run_path.name}@{'base' if lora else checkpoint.number}",
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
    return config, checkpoint
