"""MegatronBackend: a Megatron-Core trainer in worker processes, an isolated vLLM server, and the
run's folder between them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load_file

from lockstep.backends.base import Attach, Endpoint, ServerLoad, TrainResult, check_new, train_config
from lockstep.backends.megatron.jobs import job
from lockstep.backends.megatron.launch import start_both
from lockstep.backends.megatron.packed_file import PackedFile, packed_chats, packed_groups
from lockstep.backends.megatron.plan.exact import exact_config
from lockstep.backends.megatron.plan.resolve import Plan, make_plan, retention
from lockstep.backends.megatron.publish import StagedStep, publish_and_serve, serve
from lockstep.backends.megatron.recovery import back_to_published, give_gpu_back
from lockstep.backends.megatron.replacement import keep_replicas, mend
from lockstep.backends.megatron.run import Run, all_ended
from lockstep.backends.megatron.supervision import registered, survived
from lockstep.backends.megatron.verify import BeforeStep, measure_noise
from lockstep.config import deadlines
from lockstep.config.megatron import MegatronConfig
from lockstep.config.sft import SFTConfig
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError, ServerError, ServerLostError, StoreError, TrainerError, TrainerLostError
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.tokenizer_files import check_server_args
from lockstep.metrics.sinks import find_sinks
from lockstep.metrics.spans import span
from lockstep.models.checkpoint.hub import checkpoint_folder, described_folder, is_folder
from lockstep.runs.checkpoint import file_digest
from lockstep.runs.retention import prune
from lockstep.runs.store import RunCheckpoint, RunStore
from lockstep.trainer.protocol import Load, Save, StartFrom, TrainStep

if TYPE_CHECKING:
    from lockstep.backends.megatron.plan.settings import ResolvedSettings
    from lockstep.backends.megatron.probe import ProbeScores
    from lockstep.batching.token_table import TokenTable
    from lockstep.inference.environment.locate import Runtime
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import TrajectoryGroup
    from lockstep.runs.jobs import Kind

_LOG = logging.getLogger(__name__)


class MegatronBackend:
    """Trains with Megatron-Core and serves with vLLM on this machine.

    Its settings are the fields of `MegatronConfig`: `help(lockstep.MegatronConfig)`. Each has a
    default that runs on the machine at hand.

    Raises ConfigError, in one line, for a setting that is unknown, out of range, or that a run
    decides itself.
    """

    def __init__(self, path: str | Path = MegatronConfig.model_fields["path"].default, **settings: Any):
        self.config = MegatronConfig(path=Path(path), **settings)
        check_server_args(self.config.server_args)
        find_sinks(self.config.sinks)
        self.on_progress: Callable[[str], None] | None = None
        self.on_note: Callable[[str], None] = _LOG.warning
        self._runs: dict[TrainableModel, Run] = {}

    @property
    def path(self) -> Path:
        """Folder of all runs."""
        return self.config.path

    def run_path(self, model: TrainableModel) -> Path:
        """The model's folder: PATH/PROJECT/NAME."""
        return self.run_info(model).store.path

    def record(self, model: TrainableModel, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep metrics, such as an evaluation's, with those of a step in the run's SQLite file.

        step: None: the model's current step.

        Raises ConfigError if the model is not registered.
        """
        self.run_info(model).store.record(model.step if step is None else step, metrics)

    def endpoint(self, model: TrainableModel) -> Endpoint:
        run = self.run_info(model)
        server, settings = run.server, run.settings
        seed = settings.seed if self.config.seed_requests else None
        return Endpoint(
            server.base_url,
            server.api_key,
            settings.max_num_seqs,
            settings.max_model_len,
            seed,
            siblings=True,
            colocated=settings.colocated,
            keeps_steps=not settings.merged,
            replicas=run.addresses() if run.replicas > 1 else (),
        )

    async def problem(self, model: TrainableModel) -> str:
        """Why the model's server can't serve any more, in one line: it ended, or its engine did.
        Empty for a server that lives, and while one of several does.
        """
        return await self.run_info(model).problem()

    async def load(self, model: TrainableModel) -> ServerLoad | None:
        """How full the server is, of several the fullest. Raises ServerError where one does not answer."""
        names = "kv_cache_usage_perc", "num_preemptions_total"
        counted = [await server.counters(*names) for server in tuple(self.run_info(model).servers)]
        return ServerLoad(max(kv_use for kv_use, _ in counted), sum(preemptions for _, preemptions in counted))

    def run_info(self, model: TrainableModel) -> Run:
        """The live parts of a registered model: server, trainer, settings and folder, to look at.

        Raises ConfigError if the model is not registered.
        """
        run = self._runs.get(model)
        if run is None:
            raise ConfigError(f"model {model.name} is not registered: call `await model.register(backend)` first")
        return run

    def _say(self, text: str) -> None:
        if self.on_progress:
            self.on_progress(text)

    async def register(self, model: TrainableModel) -> int:
        """Start (or resume) the model's run: trainer and server, the last published step in both,
        and its verification.

        Returns that step. Raises UnsupportedModelError, StoreError, RuntimeNotInstalledError,
        TrainerError, ServerError or MismatchError.
        """
        check_new(model, self._runs)
        self._say(f"preparing {model.base_model}")
        plan = await self.resolve(model)
        runtime = find_runtime(plan.resolved.devices.kind)
        for note in plan.notes:
            self.on_note(note)
        base = await asyncio.to_thread(checkpoint_folder, model.base_model)
        settings = replace(plan.resolved, base=base)
        store = RunStore(self.path, model.project, model.name)
        try:
            identity = {
                "backend": "megatron",
                "base_model": str(settings.base) if is_folder(model.base_model) else model.base_model,
                "lora": model.lora.identity() if model.lora else None,
                "family": settings.spec.key,
                "dtype": settings.dtype,
            }
            store.claim(identity)
            store.keep_settings(plan.stored())
            store.send_metrics_to(self.config.sinks, plan.stored())
            return await registered(lambda: self._start(model, store, settings, runtime))
        except BaseException:
            self._runs.pop(model, None)
            store.close()
            raise

    async def _start(self, model: TrainableModel, store: RunStore, settings: ResolvedSettings, runtime: Runtime) -> int:
        """Trainer and server with the last published step, which is returned. On an error both are
        closed.
        """
        settings = replace(settings, server_start=store.next_server_start())
        try:
            trainer, servers = await start_both(settings, f"{model.name}@base", runtime, store.path, self._say)
        except TrainerLostError as error:  # it would mostly end in the same way again
            raise TrainerError(str(error)) from error
        run = Run(model, store, trainer, servers, settings)
        try:
            await measure_noise(run)
            step = store.latest()
            if step is not None:
                _check_resumable(step)
                await trainer.call(Load(step.path), deadline_s=deadlines.STEP_S)
            else:
                step = await _publish_first(run)
            self._runs[model] = run
            self._say(f"loading {run.name(step.number)}")
            async with job(run, "first_sync", step.number, f"server {settings.server_start}"):
                await serve(run, step.number)
            if run.replicas > 1:
                run.mending = asyncio.create_task(keep_replicas(run, self.on_note))
        except BaseException as error:
            lost = isinstance(error, ServerError) and any([await server.problem() for server in run.servers])
            await run.ended()
            if lost:
                raise ServerLostError(f"the server was lost while {model.name} was registered: {error}") from error
            raise
        return step.number

    async def resolve(self, model: TrainableModel) -> Plan:
        """Everything that registering `model` would start, with each value's reason; nothing is
        started and no weights are fetched.

        Raises ConfigError, UnsupportedModelError or RuntimeNotInstalledError, in one line, for what
        could not run.
        """
        base = await asyncio.to_thread(described_folder, model.base_model)
        return await asyncio.to_thread(make_plan, self.config, model, base)

    async def train(
        self,
        model: TrainableModel,
        groups: Sequence[TrajectoryGroup],
        config: TrainConfig | None = None,
        attach: Attach | None = None,
    ) -> TrainResult:
        """One step on `groups`: pack, train, publish step N + 1, serve it, verify it. The model's
        step advances when all of it is done.

        attach: adds to the step's folder and manifest before it is published.

        Calls for one model take turns. Raises DataError or StaleRolloutError, before anything
        changes, for groups that can't be trained on. TrainerError and MismatchError leave step N
        published and served. After a step that failed or was cancelled before it was published, the
        next one starts from the published weights.
        """
        config = train_config(config)
        run = self.run_info(model)
        if run.settings.exact:
            config = exact_config(config)
        async with run.training:
            run.check_in_step()
            config = config.at_step(model.step + 1)
            batch = await packed_groups(run, groups, config)
            kind: Kind = "merged_step" if run.settings.merged else "lora_step"
            return await self._train(run, batch, config, kind, attach)

    async def train_sft(
        self, model: TrainableModel, chats: Sequence[Mapping[str, Any]], config: SFTConfig | None = None
    ) -> TrainResult:
        """One supervised step on `chats`, published, served and verified as `train` does.

        chats: {"messages": [...], "tools": [...] or nothing}, in OpenAI's form. Assistant turns carry
            the loss, the mean cross entropy of their tokens.

        Raises DataError, before anything changes, for chats that can't be trained on
        (`SFTConfig.skip_bad_rows` leaves these out).
        """
        config = config or SFTConfig()
        run = self.run_info(model)
        async with run.training:
            run.check_in_step()
            config = config.at_step(model.step + 1)
            batch = await packed_chats(run, chats, config)
            return await self._train(run, batch, config.step_config(), "sft_step")

    async def _train(
        self, run: Run, batch: PackedFile, config: TrainConfig, kind: Kind, attach: Attach | None = None
    ) -> TrainResult:
        started, number = time.monotonic(), run.model.step + 1
        digest = await asyncio.to_thread(file_digest, batch.path)

        async def step() -> dict[str, float]:
            async with job(run, kind, number, digest) as made_by:
                await run.gpus.give_to_trainer(forget_weights=run.delivery.replaces)
                with span(run.store.path, "train", number):
                    made = await _trained(run, batch, config, made_by)
                metrics = batch.metrics | made.metrics | {"learning_rate": config.learning_rate}
                metrics["seconds_train"] = time.monotonic() - started
                self._say(f"loading {run.name(number)}")
                unpublished = StagedStep(number, made.staged, metrics, made_by, attach)
                return metrics | await publish_and_serve(run, unpublished, made.scores)

        metrics = await survived(run, number, step)
        run.model._advance(number)
        await asyncio.to_thread(run.store.record, number, metrics)
        batch.path.unlink()
        await asyncio.to_thread(prune, run.store, retention(self.config), run.needed(number), run.settings.lora is None)
        return TrainResult(number, metrics, run.store.steps_path / f"{number:04d}")

    async def recover(self, model: TrainableModel) -> bool:
        """Start the model's server again, with its current step, if it was lost. Returns whether it
        was; of several, whether one was lost since this was asked.

        Rollouts that were under way have failed; a client made after this call has the new address.
        Raises ServerError where a new server can't take the step.
        """
        run = self.run_info(model)
        async with run.training:
            lost, run.lost = run.lost, 0
            return await mend(run) or lost > 0

    async def close(self) -> None:
        """End server and trainer of every model; published steps stay. Safe to call twice."""
        runs, self._runs = list(self._runs.values()), {}
        await all_ended(*(run.close() for run in runs))


def _check_resumable(step: RunCheckpoint) -> None:
    if not step.resumable:
        raise StoreError(
            f"{step.path} has no optimizer state, retention keeps the newest step's only: start a run of another name, or "
            "set [backend] keep_optimizer_states = true before steps are deleted"
        )


@dataclass(frozen=True)
class _Step:
    """A step that was trained and not published.

    scores: of the probe, by the weights after the step.
    """

    staged: Path
    scores: ProbeScores
    metrics: dict[str, float]


async def _trained(run: Run, batch: PackedFile, config: TrainConfig, made_by: str) -> _Step:
    """The trainer's step. Whatever it raises, a colocated server serves the step of before again."""
    current = run.model.step
    try:
        reference = await asyncio.to_thread(run.reference, config)
        # Before the folder is made: a call that was given up may still be writing there until the
        # trainer answers this one.
        if run.trainer_ahead:
            await back_to_published(run, current)
        staged = run.store.stage(current + 1)
        run.trainer_ahead = True
        before = await BeforeStep.score(run, batch.sequences)
        out, logprobs = run.delivery.written_by_step(staged), batch.path.with_suffix(".logprobs")
        request = TrainStep(batch.path, config, out=out, reference=reference, logprobs=logprobs)
        trained = await run.trainer.call(request, deadline_s=deadlines.STEP_S, job=made_by)
        await asyncio.to_thread(_keep_tokens, run, batch.tokens, logprobs)
        scores, power = await before.after(run, current + 1)
    except BaseException as error:
        await give_gpu_back(run, error)
        raise
    run.probe = before.probe
    return _Step(staged, scores, trained.metrics | {"verification_power": power})


def _keep_tokens(run: Run, tokens: TokenTable, logprobs: Path) -> None:
    """Write the step's tokens for reports, with the trainer's log-probabilities if it computed any."""
    values_RS = load_file(logprobs)["logprobs_RS"] if logprobs.exists() else None
    logprobs.unlink(missing_ok=True)
    tokens.write(run.store.path / "tokens" / f"{run.model.step + 1:04d}.parquet", values_RS)


async def _publish_first(run: Run) -> RunCheckpoint:
    """Step 0: the base model, with an adapter that changes nothing, or `start_from`'s, unless all
    weights are trained.
    """
    start = run.settings.lora.start_from if run.settings.lora else None
    if start is not None:
        await run.trainer.call(StartFrom(start.expanduser().resolve()), deadline_s=deadlines.STEP_S)
    staged = run.store.stage(0)
    await run.trainer.call(Save(staged), deadline_s=deadlines.STEP_S)
    return await asyncio.to_thread(run.store.publish, 0, staged, {})
