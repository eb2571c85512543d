"""What a trainer and a server are started with, and starting them side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lockstep.backends.placement import resolve_placement
from lockstep.backends.trainer import Trainer
from lockstep.config import LoraConfig, Parallel, Placement
from lockstep.families.hub import checkpoint_folder
from lockstep.families.registry import get_model_support_spec
from lockstep.serving.client import Server
from lockstep.serving.environments import Runtime
from lockstep.serving.install import find_runtime
from lockstep.serving.launch import LoraServing, ServerConfig, launch
from lockstep.store import read_step
from lockstep.tokens.routes import RouteShape

if TYPE_CHECKING:
    from lockstep.families.config import ModelConfig
    from lockstep.families.spec import ModelSupportSpec


@dataclass(frozen=True)
class Parts:
    """Everything a run is started from, resolved: no default is left to fill in. `gpus` None: the CPU."""

    base: Path
    spec: ModelSupportSpec
    lora: LoraConfig | None
    merged: bool
    """The server holds the trained weights as its base model's, and no adapters."""
    dtype: Literal["float32", "bfloat16"]
    parallel: Parallel
    gpus: Placement | None
    routes: RouteShape | None
    """What each choice's expert routes look like; None: none are captured or replayed."""
    seed: int
    recompute: bool | None
    max_model_len: int
    tool_call_parser: str | None

    def engine_config(self) -> dict[str, Any]:
        """engine.json of the trainer processes."""
        parallel = self.parallel.model_dump(mode="json") | {"sequence": self.parallel.sequence_parallel}
        return {
            "model": str(self.base),
            "dtype": self.dtype,
            "parallel": parallel,
            "lora": self.lora
            and {
                "rank": self.lora.rank,
                "alpha": self.lora.alpha,
                "targets": list(self.lora.target_modules or self.spec.default_target_modules),
            },
            "seed": self.seed,
            "recompute": self.recompute,
        }

    def server_config(self, served_name: str) -> ServerConfig:
        return ServerConfig(
            model=self.base,
            served_name=served_name,
            dtype=self.dtype,
            lora=lora_serving(self.lora, self.spec) if self.lora and not self.merged else None,
            tool_call_parser=self.tool_call_parser or self.spec.tool_call_parser,
            max_model_len=self.max_model_len,
            capture_routes=self.routes is not None,
            gpus=self.gpus.inference if self.gpus else (),
            seed=self.seed,
        )


def lora_serving(lora: LoraConfig, spec: ModelSupportSpec) -> LoraServing:
    return LoraServing(max_rank=lora.rank, targets=lora.target_modules or spec.default_target_modules)


def route_shape(config: ModelConfig) -> RouteShape | None:
    """The expert routes of a model, which has them in its mixture-of-experts layers only; None for a dense one."""
    return RouteShape(sum(config.moe_layers), config.experts_per_token, config.experts) if config.is_moe else None


async def start_both(
    parts: Parts, served_name: str, runtime: Runtime, folder: Path, say: Callable[[str], None]
) -> tuple[Trainer, Server]:
    """Trainer and server, started side by side: (trainer, server). The caller closes them.

    folder: of the run, for the logs. If one fails to start, the other is closed and the error raised.
    """
    gpus = parts.gpus.trainer if parts.gpus else ()
    log = folder / "logs" / "trainer.log"
    starting = (
        asyncio.ensure_future(Trainer.start(parts.engine_config(), parts.parallel.processes, log, gpus=gpus)),
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


async def serve_step(run_path: Path, step: int | None, progress: Callable[[str], None]) -> tuple[Server, str]:
    """A server with a published step, without a trainer: (server, "name@step"). The caller closes it.

    A run of adapters serves base model and adapter, a run of all weights the model that the step holds.

    run_path: PATH/PROJECT/NAME. Raises StoreError for a folder that is no run or a step that isn't published.
    """
    identity, found = read_step(run_path, step)
    base = checkpoint_folder(identity["base_model"])
    spec = get_model_support_spec(str(base))
    gpus, lora, name = resolve_placement(None), identity["lora"], f"{run_path.name}@{found.number}"
    config = ServerConfig(
        model=base if lora else found.path / "model",
        served_name=f"{run_path.name}@base" if lora else name,
        dtype=identity["dtype"],
        lora=lora_serving(LoraConfig(**lora), spec) if lora else None,
        tool_call_parser=spec.tool_call_parser,
        gpus=gpus.inference if gpus else (),
    )
    server = await launch(config, find_runtime("cuda" if gpus else "cpu"), run_path, progress)
    if lora is None:
        return server, name
    try:
        await server.load_adapter(name, found.adapter)
    except BaseException:
        await server.close()
        raise
    return server, name
