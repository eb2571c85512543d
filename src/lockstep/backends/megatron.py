"""MegatronBackend: a Megatron-Core trainer in worker processes, an isolated vLLM server, and the run's folder between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors.numpy import load_file

from lockstep.backends.base import Endpoint
from lockstep.backends.probe import Probe
from lockstep.backends.trainer import Trainer
from lockstep.config import LoraConfig, Parallel, Placement, TrainConfig, TrainResult, unsupported
from lockstep.errors import ConfigError, MismatchError, ServerError, StoreError, WeightsError
from lockstep.families.config import checkpoint_dtype
from lockstep.families.hub import checkpoint_folder
from lockstep.families.registry import get_model_support_spec, load_model_config
from lockstep.serving.client import Server
from lockstep.serving.install import find_runtime
from lockstep.serving.launch import LoraServing, ServerConfig, launch
from lockstep.store import RunStore, Step, read_step
from lockstep.tokens.batch import unpack_scores
from lockstep.tokens.pack import pack, save_batch
from lockstep.tokens.prepare import prepare
from lockstep.tokens.routes import RouteShape, decode_routes
from lockstep.tokens.tree import scoring_sequence

if TYPE_CHECKING:
    from lockstep.families.config import ModelConfig
    from lockstep.families.spec import ModelSupportSpec
    from lockstep.model import TrainableModel
    from lockstep.trajectory import TrajectoryGroup


@dataclass
class _Run:
    """What a registered model owns."""

    store: RunStore
    trainer: Trainer
    server: Server
    probe: Probe
    served: set[int]
    routes: RouteShape | None
    """What each choice's expert routes look like; None: none are captured or replayed."""
    merged: bool
    """The server holds the trained weights as its base model's, and no adapters."""


class MegatronBackend:
    """Trains with Megatron-Core and serves with vLLM on this machine. Every argument has a default that runs on the machine at hand.

    path: folder of all runs. rollout_weights_mode: how new weights reach the server. placement: GPU numbers of the trainer and the
    server; None runs on the CPU when there is no GPU, and on GPU 0 and 1 otherwise. parallel: how the trainer is spread over
    processes. enable_expert_replay: train mixture-of-experts models on the experts the server used. max_model_len: longest sequence
    the server accepts, in tokens. dtype: of the weights; None takes the checkpoint's. seed: of the adapter's initial values and the
    server's sampling. recompute: keep only layer inputs and recompute the rest in the backward pass; None: as memory asks for it.
    tool_call_parser: vLLM's parser that turns the model's text into tool calls; None takes the family's.

    Raises ConfigError for a setting it can't honour.
    """

    def __init__(
        self,
        path: str | Path = "./runs",
        rollout_weights_mode: Literal["lora", "merged"] = "lora",
        placement: Placement | None = None,
        parallel: Parallel | None = None,
        enable_expert_replay: bool = True,
        max_model_len: int = 2048,
        dtype: Literal["float32", "bfloat16"] | None = None,
        seed: int = 0,
        recompute: bool | None = None,
        tool_call_parser: str | None = None,
    ):
        self.path = Path(path)
        self.parallel = parallel or Parallel()
        self.placement = placement
        self.max_model_len = max_model_len
        self.dtype: Literal["float32", "bfloat16"] | None = dtype
        self.seed = seed
        self.recompute = recompute
        self.tool_call_parser = tool_call_parser
        self.enable_expert_replay = enable_expert_replay
        self.on_progress: Callable[[str], None] | None = None
        self._runs: dict[str, _Run] = {}
        if rollout_weights_mode not in ("lora", "merged"):
            raise unsupported("rollout_weights_mode", rollout_weights_mode, "MegatronBackend", "use 'lora' or 'merged'")
        self.rollout_weights_mode = rollout_weights_mode
        if self.parallel.context > 1:
            raise unsupported(
                "parallel.context", self.parallel.context, "MegatronBackend", "rows must fit one tensor-parallel group"
            )

    def run_path(self, model: TrainableModel) -> Path:
        """The model's folder: PATH/PROJECT/NAME."""
        return self._run(model).store.path

    def endpoint(self, model: TrainableModel) -> Endpoint:
        server = self._run(model).server
        return Endpoint(server.base_url, server.api_key)

    def _run(self, model: TrainableModel) -> _Run:
        run = self._runs.get(model.name)
        if run is None:
            raise ConfigError(f"model {model.name} is not registered: call `await model.register(backend)` first")
        return run

    def _say(self, text: str) -> None:
        if self.on_progress:
            self.on_progress(text)

    async def register(self, model: TrainableModel) -> int:
        """Start (or resume) the model's run: trainer and server side by side, the last published step in both, and the proof.

        Returns that step. Raises UnsupportedModelError, StoreError, RuntimeNotInstalledError, TrainerError or ServerError.
        """
        if model.name in self._runs:
            raise ConfigError(f"model {model.name} is registered already")
        merged = self.rollout_weights_mode == "merged"
        if model.lora is None and not merged:
            raise unsupported("lora", None, "MegatronBackend", "full weights need rollout_weights_mode 'merged'")
        spec = get_model_support_spec(model.base_model)
        self._say(f"preparing {model.base_model}")
        base = await asyncio.to_thread(checkpoint_folder, model.base_model)
        config = load_model_config(str(base))
        dtype = self.dtype or checkpoint_dtype(base)
        routes = route_shape(config) if self.enable_expert_replay else None
        gpus = _placement(self.placement)
        if merged and gpus:
            raise unsupported(
                "rollout_weights_mode",
                "merged",
                "MegatronBackend",
                "weights travel between CPU processes only for now; on GPUs use 'lora'",
            )
        runtime = find_runtime("cuda" if gpus else "cpu")
        store = RunStore(self.path, model.project, model.name)
        started: list[Any] = []
        try:
            identity = {
                "base_model": model.base_model,
                "lora": model.lora.model_dump(mode="json") if model.lora else None,
                "family": spec.key,
                "dtype": dtype,
            }
            store.claim(identity)
            step = store.latest()
            server_config = ServerConfig(
                model=base,
                served_name=f"{model.name}@base",
                dtype=dtype,
                lora=_lora_serving(model.lora, spec) if model.lora and not merged else None,
                tool_call_parser=self.tool_call_parser or spec.tool_call_parser,
                max_model_len=self.max_model_len,
                capture_routes=routes is not None,
                gpus=gpus.inference if gpus else (),
                seed=self.seed,
            )
            engine = self._engine_config(model.lora, spec, base, dtype)
            starting = [
                asyncio.ensure_future(
                    Trainer.start(
                        engine,
                        self.parallel.processes,
                        store.path / "logs" / "trainer.log",
                        gpus=gpus.trainer if gpus else (),
                    )
                ),
                asyncio.ensure_future(launch(server_config, runtime, store.path, self._say)),
            ]
            trainer, server = await _both(starting, started)
            run = _Run(store, trainer, server, Probe.make(config.vocab_size, dtype), set(), routes, merged)
            if step is not None:
                await trainer.call("load", {"step_dir": str(step.path)}, deadline_s=_STEP_DEADLINE_S)
            if step is None:
                step = await self._publish_first(run)
            self._runs[model.name] = run
            await self._serve(run, model, step)
            return step.number
        except BaseException:
            self._runs.pop(model.name, None)
            await asyncio.gather(*(thing.close() for thing in started))
            store.close()
            raise

    def _engine_config(self, lora: LoraConfig | None, spec: ModelSupportSpec, base: Path, dtype: str) -> dict[str, Any]:
        parallel = self.parallel.model_dump(mode="json") | {"sequence": self.parallel.sequence_parallel}
        return {
            "model": str(base),
            "dtype": dtype,
            "parallel": parallel,
            "lora": lora
            and {
                "rank": lora.rank,
                "alpha": lora.alpha,
                "targets": list(lora.target_modules or spec.default_target_modules),
            },
            "seed": self.seed,
            "recompute": self.recompute,
        }

    async def _publish_first(self, run: _Run) -> Step:
        """Step 0: the base model, with an adapter that changes nothing unless all weights are trained."""
        staged = run.store.stage(0)
        await run.trainer.call("save", {"out": str(staged)}, deadline_s=_STEP_DEADLINE_S)
        return await asyncio.to_thread(run.store.publish, 0, staged, {})

    async def _serve(self, run: _Run, model: TrainableModel, step: Step) -> dict[str, float]:
        """Bring `step`, which the trainer holds, into the server, prove that it is there, and retire what no rollout uses.

        Returns the probe's mean difference and what a merged sync took.
        """
        name = f"{model.name}@{step.number}"
        self._say(f"loading {name}")
        figures = await self._sync(run, name) if run.merged else {}
        if not run.merged:
            await run.server.load_adapter(name, step.adapter)
        tokens = list(run.probe.tokens)
        served, choice = await run.server.score_choice(name, tokens)
        trained = await self._score(run, tokens, _probe_routes(run, choice))
        figures["probe"] = run.probe.compare(name, served, trained, run.server.child.log_path)
        if run.merged:
            return figures
        run.served.add(step.number)
        keep = {step.number, step.number - 1} | model.leased_steps()
        for old in sorted(run.served - keep):
            await run.server.unload_adapter(f"{model.name}@{old}")
            run.served.discard(old)
        return figures

    async def _sync(self, run: _Run, name: str) -> dict[str, float]:
        """Merged weights from the trainer's memory into the server, which from then on is `name` and nothing else.

        Raises ServerError, WeightsError or MismatchError; the server then serves what it served before.
        """
        arguments = {
            "root_url": run.server.root_url,
            "api_key": run.server.api_key,
            "version": name,
            "transport": "gloo",
            "deadline_s": _SYNC_DEADLINE_S,
        }
        try:
            reply = await run.trainer.call("sync", arguments, deadline_s=_STEP_DEADLINE_S)
        except (ServerError, WeightsError, MismatchError) as error:
            run.server.check_alive()
            raise type(error)(
                f"{name} did not reach the server, which still serves {run.server.served_name}: {error}; "
                "close the backend and register again to go on from the last published step"
            ) from error
        run.server.served_name = name
        return {
            "sync_bytes": float(reply["nbytes"]),
            "seconds_sync_transfer": reply["transfer_s"],
            "seconds_sync_pause": reply["pause_s"],
        }

    async def _score(self, run: _Run, tokens: list[int], routes_SLK: np.ndarray | None) -> list[float]:
        """The trainer's log-probability of each token after the first, on the experts that the server used."""
        batch_path, out = (
            run.store.path / "batches" / name for name in ("probe.safetensors", "probe-scores.safetensors")
        )
        sequence = scoring_sequence("probe", tokens, routes_SLK)
        batch = pack([sequence], np.zeros(1), np.ones(1), data=self.parallel.data)
        await asyncio.to_thread(save_batch, batch, batch_path)
        await run.trainer.call("score", {"batch": str(batch_path), "out": str(out)}, deadline_s=_STEP_DEADLINE_S)
        scores = await asyncio.to_thread(load_file, out)
        return [float(value) for value in unpack_scores(batch, scores["logprobs_RS"])[0]]

    async def train(
        self, model: TrainableModel, groups: Sequence[TrajectoryGroup], config: TrainConfig | None = None
    ) -> TrainResult:
        """One step on `groups`: pack, train, publish step N + 1, serve it, prove it. The model's step advances when it is served.

        Raises DataError or StaleRolloutError for groups that can't be trained on, before anything changes; TrainerError or
        MismatchError leave step N published and served.
        """
        run, config = self._run(model), config or TrainConfig()
        started = time.monotonic()
        current = model.step
        _check_in_step(model, run.store)
        prepared = await asyncio.to_thread(
            prepare,
            groups,
            model_name=model.name,
            step=current,
            config=config,
            data=self.parallel.data,
            routes=run.routes,
        )
        metrics = dict(prepared.metrics)
        folder = run.store.path / "batches"
        batch_path = folder / f"{current:04d}.safetensors"
        await asyncio.to_thread(save_batch, prepared.batch, batch_path)
        staged = run.store.stage(current + 1)
        arguments: dict[str, Any] = {
            "batch": str(batch_path),
            "config": config.model_dump(mode="json"),
            "out": str(staged),
        }
        if config.reference_step is not None:
            arguments["reference"] = str(run.store.step(config.reference_step).path)
        reply = await run.trainer.call("train_step", arguments, deadline_s=_STEP_DEADLINE_S)
        metrics |= reply["metrics"]
        metrics["seconds_train"] = time.monotonic() - started
        step = await asyncio.to_thread(run.store.publish, current + 1, staged, metrics)
        started = time.monotonic()
        synced = await self._serve(run, model, step)
        synced["seconds_sync"] = time.monotonic() - started
        metrics |= synced
        run.store.record(step.number, synced)
        batch_path.unlink()
        model._advance(step.number)
        return TrainResult(step.number, metrics, step.path)

    async def close(self) -> None:
        """End server and trainer of every model; published steps stay. Safe to call twice."""
        runs, self._runs = list(self._runs.values()), {}
        for run in runs:
            await asyncio.gather(run.trainer.close(), run.server.close())
            run.store.close()


def _probe_routes(run: _Run, choice: dict[str, Any]) -> np.ndarray | None:
    """The experts the server used for the probe; None where none are captured."""
    if run.routes is None:
        return None
    given = (choice.get("routed_experts"), choice.get("routes_digest"))
    return decode_routes(*given, choice["prompt_token_ids"], choice["token_ids"], run.routes, "the probe")


def _lora_serving(lora: LoraConfig, spec: ModelSupportSpec) -> LoraServing:
    return LoraServing(max_rank=lora.rank, targets=lora.target_modules or spec.default_target_modules)


def route_shape(config: ModelConfig) -> RouteShape | None:
    """The expert routes of a model, which has them in its mixture-of-experts layers only; None for a dense one."""
    return RouteShape(sum(config.moe_layers), config.experts_per_token, config.experts) if config.is_moe else None


async def serve_step(run_path: Path, step: int | None, progress: Callable[[str], None]) -> tuple[Server, str]:
    """A server with a published step, without a trainer: (server, "name@step"). The caller closes it.

    A run of adapters serves base model and adapter, a run of all weights the model that the step holds.

    run_path: PATH/PROJECT/NAME. Raises StoreError for a folder that is no run or a step that isn't published.
    """
    identity, found = read_step(run_path, step)
    base = checkpoint_folder(identity["base_model"])
    spec = get_model_support_spec(str(base))
    gpus, lora, name = _placement(None), identity["lora"], f"{run_path.name}@{found.number}"
    config = ServerConfig(
        model=base if lora else found.path / "model",
        served_name=f"{run_path.name}@base" if lora else name,
        dtype=identity["dtype"],
        lora=_lora_serving(LoraConfig(**lora), spec) if lora else None,
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


_STEP_DEADLINE_S = 600.0
"""Longest silence of the trainer while it works; it sends heartbeats, so this bounds a hang and not a long step."""
_SYNC_DEADLINE_S = 300.0
"""Longest single wait of a merged sync: to join, for the receiver of a bucket, for the swap."""


def _check_in_step(model: TrainableModel, store: RunStore) -> None:
    """Raise StoreError if a step was published that never got served: the trainer is ahead of the rollouts then."""
    latest = store.published()[-1]
    if latest != model.step:
        raise StoreError(
            f"{model.name} has published step {latest} but serves step {model.step}, since the step's sync failed: "
            "close the backend and register again to go on from the published step"
        )


async def _both(starting: list[asyncio.Future], started: list[Any]) -> list[Any]:
    """Wait for all; if one fails, close those that came up and raise its error."""
    try:
        started += await asyncio.gather(*starting)
        return started
    except BaseException:
        for task in starting:
            task.cancel()
        ended = await asyncio.gather(*starting, return_exceptions=True)
        started += [thing for thing in ended if not isinstance(thing, BaseException)]
        raise


def _placement(placement: Placement | None) -> Placement | None:
    """The given placement; else GPU 0 and 1, or None (CPU) without a GPU. Raises ConfigError for what this machine lacks."""
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if placement is None and count == 1:
        raise ConfigError(
            "one GPU: trainer and server need one each for now; set placement, or hide the GPU to run on the CPU"
        )
    if placement is None:
        return Placement(trainer=(0,), inference=(1,)) if count else None
    if placement.shared:
        raise unsupported(
            "placement", placement, "MegatronBackend", "trainer and server need GPUs of their own for now"
        )
    wanted = max(*placement.trainer, *placement.inference)
    if wanted >= count:
        raise ConfigError(
            f"placement names GPU {wanted}, this machine has {count}: choose from 0 to {count - 1}"
            if count
            else "placement names GPUs, this machine has none: leave placement out to run on the CPU"
        )
    return placement
