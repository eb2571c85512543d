"""MegatronBackend: a Megatron-Core trainer in worker processes, an isolated vLLM server, and the run's folder between them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lockstep.backends.base import Endpoint, TrainResult, check_new
from lockstep.backends.megatron.colocated import trainers_turn
from lockstep.backends.megatron.exact import exact_config
from lockstep.backends.megatron.launch import start_both
from lockstep.backends.megatron.publish import back_to_published, give_up_turn, publish_and_serve, serve
from lockstep.backends.megatron.resolve import Asked, Plan, make_plan
from lockstep.backends.megatron.run import STEP_DEADLINE_S, Run, all_ended
from lockstep.backends.megatron.verify import LEAST_CONTEXT, BeforeStep, measure_noise
from lockstep.batching.pack import save_batch
from lockstep.batching.prepare import prepare
from lockstep.config.base import unsupported
from lockstep.config.megatron import Parallel, Placement
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.tokenizer_files import check_server_args
from lockstep.models.checkpoint.hub import checkpoint_folder, described_folder, is_folder
from lockstep.runs.store import RunStore, Step

if TYPE_CHECKING:
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import TrajectoryGroup

_LOG = logging.getLogger(__name__)
_KNOWN = {
    "rollout_weights_mode": ("lora", "merged"),
    "numerics": ("fast", "exact"),
    "dtype": ("float32", "bfloat16", None),
    "weight_transport": ("gloo", "nccl", "ipc", "disk", None),
}


class MegatronBackend:
    """Trains with Megatron-Core and serves with vLLM on this machine. Every argument has a default that runs on the machine at hand.

    path: folder of all runs.
    rollout_weights_mode: how new weights reach the server.
    placement: GPU numbers of the trainer and the server; None runs on the CPU when there is no GPU, on one GPU in turns (shared mode), and
        else on GPU 0 and 1.
    parallel: how the trainer is spread over processes.
    enable_expert_replay: train mixture-of-experts models on the experts the server used.
    max_model_len: longest sequence the server accepts, in tokens; None takes the model's positions, as far as memory holds them.
    dtype: of the weights; None takes the checkpoint's (bfloat16 for adapters on a GPU, whose kernels take nothing wider).
    numerics: "fast", or "exact": on a CPU, fp32 weights computed in fp64 on both sides, so that every sampled token's log-probability
        agrees to 1e-6 nats, which each step checks (docs/numerics.md).
    seed: of the adapter's initial values and the server's sampling.
    recompute: keep only layer inputs and recompute the rest in the backward pass; None: as memory asks for it.
    tool_call_parser: vLLM's parser that turns the model's text into tool calls; None takes the family's where the tokenizer and the chat
        template serve it, and else refuses requests with tools.
    offload: in shared mode the trainer's weights and optimizer go to host memory while the server serves; None: they do. False keeps them
        on the GPU, which the server then has less of.
    weight_transport: how weights and adapters travel from the trainer's memory to the server, "disk" or what fits the placement (None).
    server_args: further arguments of vLLM's command line, such as ("--enforce-eager",); they win over ours, but
        for those that the run decides itself, which are refused.

    Raises ConfigError for a setting it can't honour.
    """

    def __init__(
        self,
        path: str | Path = "./runs",
        rollout_weights_mode: Literal["lora", "merged"] = "lora",
        placement: Placement | None = None,
        parallel: Parallel | None = None,
        enable_expert_replay: bool = True,
        max_model_len: int | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        numerics: Literal["fast", "exact"] = "fast",
        seed: int = 0,
        recompute: bool | None = None,
        tool_call_parser: str | None = None,
        offload: bool | None = None,
        weight_transport: Literal["gloo", "nccl", "ipc", "disk"] | None = None,
        server_args: Sequence[str] = (),
    ):
        self.path = Path(path)
        self.parallel = parallel or Parallel()
        self.placement = placement
        self.max_model_len = max_model_len
        self.dtype: Literal["float32", "bfloat16"] | None = dtype
        self.numerics: Literal["fast", "exact"] = numerics
        self.seed = seed
        self.recompute = recompute
        self.tool_call_parser = tool_call_parser
        self.offload = offload
        self.weight_transport: str | None = weight_transport
        self.server_args = tuple(server_args)
        self.enable_expert_replay = enable_expert_replay
        self.on_progress: Callable[[str], None] | None = None
        self.on_note: Callable[[str], None] = _LOG.warning
        self._runs: dict[TrainableModel, Run] = {}
        self.rollout_weights_mode = rollout_weights_mode
        self._check()

    def _check(self) -> None:
        """Raise ConfigError for a setting that no model could be trained with."""
        for name, known in _KNOWN.items():
            if (value := getattr(self, name)) not in known:
                choices = ", ".join(repr(one) for one in known if one is not None)
                raise unsupported(name, value, "MegatronBackend", f"it is one of {choices}")
        for name, least in (("max_model_len", LEAST_CONTEXT), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise unsupported(name, value, "MegatronBackend", f"it is {least} or more")
        check_server_args(self.server_args)

    def run_path(self, model: TrainableModel) -> Path:
        """The model's folder: PATH/PROJECT/NAME."""
        return self._run(model).store.path

    def endpoint(self, model: TrainableModel) -> Endpoint:
        run = self._run(model)
        return Endpoint(run.server.base_url, run.server.api_key, run.parts.max_num_seqs, run.parts.max_model_len)

    def _run(self, model: TrainableModel) -> Run:
        run = self._runs.get(model)
        if run is None:
            raise ConfigError(f"model {model.name} is not registered: call `await model.register(backend)` first")
        return run

    def _say(self, text: str) -> None:
        if self.on_progress:
            self.on_progress(text)

    async def register(self, model: TrainableModel) -> int:
        """Start (or resume) the model's run: trainer and server, the last published step in both, and its verification.

        Returns that step. Raises UnsupportedModelError, StoreError, RuntimeNotInstalledError, TrainerError, ServerError or MismatchError.
        """
        check_new(model, self._runs)
        self._say(f"preparing {model.base_model}")
        plan = await self.resolve(model)
        runtime = find_runtime(plan.parts.devices.kind)
        for note in plan.notes:
            self.on_note(note)
        base = await asyncio.to_thread(checkpoint_folder, model.base_model)
        parts = replace(plan.parts, base=base)
        store = RunStore(self.path, model.project, model.name)
        run: Run | None = None
        try:
            identity = {
                "backend": "megatron",
                "base_model": str(parts.base) if is_folder(model.base_model) else model.base_model,
                "lora": model.lora.model_dump(mode="json") if model.lora else None,
                "family": parts.spec.key,
                "dtype": parts.dtype,
            }
            store.claim(identity)
            store.keep_settings(plan.stored())
            parts = replace(parts, server_start=store.next_server_start())
            trainer, server = await start_both(parts, f"{model.name}@base", runtime, store.path, self._say)
            run = Run(model, store, trainer, server, parts)
            await measure_noise(run)
            step = store.latest()
            if step is not None:
                await trainer.call("load", {"step_dir": str(step.path)}, deadline_s=STEP_DEADLINE_S)
            else:
                step = await _publish_first(run)
            self._runs[model] = run
            self._say(f"loading {run.name(step.number)}")
            await serve(run, step.number)
            return step.number
        except BaseException:
            self._runs.pop(model, None)
            if run is not None:
                await run.close()
            else:
                store.close()
            raise

    async def resolve(self, model: TrainableModel) -> Plan:
        """Everything that registering `model` would start, with each value's reason; nothing is started and no weights are fetched.

        Raises ConfigError, UnsupportedModelError or RuntimeNotInstalledError, in one line, for what could not run.
        """
        base = await asyncio.to_thread(described_folder, model.base_model)
        asked = Asked(
            path=self.path,
            merged=self.rollout_weights_mode == "merged",
            placement=self.placement,
            parallel=self.parallel,
            replay=self.enable_expert_replay,
            max_model_len=self.max_model_len,
            dtype=self.dtype,
            exact=self.numerics == "exact",
            seed=self.seed,
            recompute=self.recompute,
            tool_call_parser=self.tool_call_parser,
            offload=self.offload,
            weight_transport=self.weight_transport,
            server_args=self.server_args,
        )
        return await asyncio.to_thread(make_plan, asked, model, base)

    async def train(
        self, model: TrainableModel, groups: Sequence[TrajectoryGroup], config: TrainConfig | None = None
    ) -> TrainResult:
        """One step on `groups`: pack, train, publish step N + 1, serve it, verify it. The model's step advances when all of it is done.

        Calls for one model take turns. Raises DataError or StaleRolloutError for groups that can't be trained on, before anything
        changes; TrainerError or MismatchError leave step N published and served. After a step that failed or was cancelled before it
        was published, the next one starts from the published weights.
        """
        run, config = self._run(model), config or TrainConfig()
        if run.parts.exact:
            config = exact_config(config)
        async with run.training:
            return await self._train(run, groups, config)

    async def _train(self, run: Run, groups: Sequence[TrajectoryGroup], config: TrainConfig) -> TrainResult:
        started = time.monotonic()
        model, current = run.model, run.model.step
        run.check_in_step()
        prepared = await asyncio.to_thread(
            prepare,
            groups,
            model_name=model.name,
            step=current,
            config=config,
            data=self.parallel.data,
            routes=run.parts.routes,
        )
        metrics = dict(prepared.metrics)
        batch_path = run.store.path / "batches" / f"{current:04d}.safetensors"
        await asyncio.to_thread(save_batch, prepared.batch, batch_path)
        arguments: dict[str, Any] = {"batch": str(batch_path), "config": config.model_dump(mode="json")}
        if config.reference_step is not None:
            arguments["reference"] = str(run.store.step(config.reference_step).path)
        await trainers_turn(run, forget_weights=run.parts.merged)
        try:
            # Before the folder is made: a call that was given up may still be writing there until the trainer answers this one.
            if run.trainer_ahead:
                await back_to_published(run, current)
            staged = run.store.stage(current + 1)
            run.trainer_ahead = True
            # An adapter leaves before its folder is written.
            arguments["out"] = str(staged) if run.parts.merged else None
            before = await BeforeStep.score(run, prepared.sequences)
            reply = await run.trainer.call("train_step", arguments, deadline_s=STEP_DEADLINE_S)
            scores, power = await before.after(run, current + 1)
        except BaseException as error:
            await give_up_turn(run, error)
            raise
        run.probe = before.probe
        metrics |= reply["metrics"] | {"verification_power": power}
        metrics["seconds_train"] = time.monotonic() - started
        self._say(f"loading {run.name(current + 1)}")
        step, synced = await publish_and_serve(run, current + 1, staged, metrics, scores)
        model._advance(step.number)
        run.store.record(step.number, synced)
        batch_path.unlink()
        return TrainResult(step.number, metrics | synced, step.path)

    async def close(self) -> None:
        """End server and trainer of every model; published steps stay. Safe to call twice."""
        runs, self._runs = list(self._runs.values()), {}
        await all_ended(*(run.close() for run in runs))


async def _publish_first(run: Run) -> Step:
    """Step 0: the base model, with an adapter that changes nothing unless all weights are trained."""
    staged = run.store.stage(0)
    await run.trainer.call("save", {"out": str(staged)}, deadline_s=STEP_DEADLINE_S)
    return await asyncio.to_thread(run.store.publish, 0, staged, {})
