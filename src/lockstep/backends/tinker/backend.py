"""TinkerBackend: the Tinker service trains and samples, and a loopback endpoint makes it look like
our own server.

Written against tinker 0.38 and not verified against the service itself. The tests replace the
service with a small model of their own.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.backends.base import Attach, Endpoint, ServerLoad, TrainResult, check_new, train_config
from lockstep.backends.tinker import chat_format
from lockstep.backends.tinker.chat_server import ChatEndpoint, RequestError
from lockstep.backends.tinker.datums import (
    Example,
    check_lora,
    check_train_config,
    examples_of,
    loss_inputs,
    step_metrics,
)
from lockstep.batching.packed_batch import has_signal
from lockstep.batching.prepare import prepare
from lockstep.config import deadlines
from lockstep.config.base import unsupported
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError, StoreError, TrainerError
from lockstep.metrics.sinks import find_sinks
from lockstep.models.checkpoint.hub import is_folder
from lockstep.models.registry import get_model_support_spec
from lockstep.runs.store import RunCheckpoint, RunStore

if TYPE_CHECKING:
    from lockstep.model import TrainableModel
    from lockstep.models.spec import ModelSupportSpec
    from lockstep.rollouts.trajectory import TrajectoryGroup

_PATHS = "tinker.json"
"""In a step's folder: where the service keeps its training state and its sampler weights."""


@dataclass
class _Run:
    """Everything that a registered model owns. `trainer` None: the service's copy is ahead of the
    last step, load that one first.
    """

    store: RunStore
    spec: ModelSupportSpec
    trainer: Any
    tokenizer: Any
    samplers: dict[int, Any]
    endpoint: ChatEndpoint


class TinkerBackend:
    """Trains and samples on the Tinker service: LoRA only, no GPU here. Needs `pip install
    lockstep-rl[tinker]`.

    path: folder of all runs.
    api_key: the service's; None takes the environment's TINKER_API_KEY.
    seed: of the adapter's initial values.
    base_url: another service with Tinker's API; None is the SDK's own default.
    sinks: where metrics go besides run.sqlite and metrics.jsonl (docs/how-to/metrics.md).

    A model's `base_model` must be a Hugging Face id that the registry and the service both know.
    Agents reach the samplers through `model.openai_client()`: chat completions, no streams; a field
    the endpoint does not understand is refused by name. Each step's weights stay with the service,
    the run's folder holds their addresses.
    """

    def __init__(
        self,
        path: str | Path = "./runs",
        api_key: str | None = None,
        seed: int = 0,
        base_url: str | None = None,
        sinks: Sequence[str] = (),
    ):
        find_sinks(sinks)
        self.sinks = tuple(sinks)
        self.path = Path(path)
        self.seed = seed
        self.base_url = base_url
        self._api_key = api_key
        self._service: Any = None
        self._runs: dict[TrainableModel, _Run] = {}

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
        endpoint = self.run_info(model).endpoint.endpoint
        assert endpoint is not None
        return endpoint

    def run_info(self, model: TrainableModel) -> _Run:
        """The live parts of a registered model. Raises ConfigError if the model is not registered."""
        run = self._runs.get(model)
        if run is None:
            raise ConfigError(f"model {model.name} is not registered: call `await model.register(backend)` first")
        return run

    async def register(self, model: TrainableModel) -> int:
        """Create (or load) the model's adapter on the service and open its endpoint; returns the
        last published step.

        Raises UnsupportedModelError, ConfigError, StoreError or TrainerError.
        """
        check_new(model, self._runs)
        if is_folder(model.base_model):
            raise unsupported(
                "base_model", model.base_model, "TinkerBackend", "the service knows Hugging Face ids only"
            )
        spec = get_model_support_spec(model.base_model)
        parts = check_lora(model.lora, spec)
        assert model.lora is not None
        service = await self._connect()
        store = RunStore(self.path, model.project, model.name)
        try:
            lora = model.lora.identity()
            identity = {"backend": "tinker", "base_model": model.base_model, "lora": lora, "family": spec.key}
            store.claim(identity)
            store.send_metrics_to(self.sinks, identity)
            step = store.latest()
            if step is None:
                trainer = await _open(
                    f"creating an adapter of {model.base_model}",
                    service.create_lora_training_client,
                    model.base_model,
                    rank=model.lora.rank,
                    seed=self.seed,
                    **parts,
                )
                sampler, step = await self._publish(store, trainer, 0, {})
            else:
                trainer = await self._load(step)
                sampler = await self._sampler(_paths(step)["sampler"])
            tokenizer = await asyncio.to_thread(trainer.get_tokenizer)
            run = _Run(store, spec, trainer, tokenizer, {step.number: sampler}, _endpoint(self, model))
            await asyncio.to_thread(run.endpoint.start)
        except BaseException:
            store.close()
            raise
        self._runs[model] = run
        return step.number

    async def _connect(self) -> Any:
        if self._service is None:
            key = self._api_key or os.environ.get("TINKER_API_KEY")
            if not key:
                raise ConfigError("TinkerBackend needs a key: give api_key, or set TINKER_API_KEY")
            self._service = await asyncio.to_thread(_sdk().ServiceClient, api_key=key, base_url=self.base_url)
        return self._service

    async def _load(self, step: RunCheckpoint) -> Any:
        """A training client that stands at `step`, optimizer included."""
        create = self._service.create_training_client_from_state_with_optimizer
        return await _open(f"loading step {step.number}", create, _paths(step)["state"])

    async def _sampler(self, path: str) -> Any:
        return await _open("creating a sampler", self._service.create_sampling_client, model_path=path)

    async def _publish(
        self, store: RunStore, trainer: Any, number: int, metrics: dict[str, float], attach: Attach | None = None
    ) -> tuple[Any, RunCheckpoint]:
        """Save what the trainer holds as step `number`, with a sampler of it."""
        name = f"step-{number:04d}"
        state = trainer.save_state(name)
        weights = trainer.save_weights_for_sampler(name)
        paths = {
            "state": (await _answer(state, f"saving step {number}", deadlines.TINKER_CALL_S)).path,
            "sampler": (await _answer(weights, f"saving the sampler of step {number}", deadlines.TINKER_CALL_S)).path,
        }
        sampler = await self._sampler(paths["sampler"])
        staged = store.stage(number)
        (staged / _PATHS).write_text(json.dumps(paths))
        state = await attach(staged) if attach else None
        return sampler, await asyncio.to_thread(store.publish, number, staged, metrics, state)

    async def train(
        self,
        model: TrainableModel,
        groups: Sequence[TrajectoryGroup],
        config: TrainConfig | None = None,
        attach: Attach | None = None,
    ) -> TrainResult:
        """One step on `groups`: check, train, save, publish step N + 1 and serve it.

        attach: adds to the step's folder and manifest before it is published.

        Raises ConfigError for a setting that the service can't honour. Raises DataError or
        StaleRolloutError, before anything changes, for groups that can't be trained on.
        TrainerError and MismatchError leave step N published, served and trained on.
        """
        config = train_config(config)
        run = self.run_info(model)
        check_train_config(config)
        current, started = model.step, time.monotonic()
        config = config.at_step(current + 1)
        prepared = await asyncio.to_thread(prepare, groups, model_name=model.name, step=current, config=config)
        examples = await asyncio.to_thread(examples_of, prepared.batch)
        trainer, run.trainer = run.trainer, None  # given back when what it holds is published
        if trainer is None:
            trainer = await self._load(run.store.step(current))
        # Momentum alone must not move the weights.
        if has_signal(prepared.batch, range(prepared.batch.rows)):
            metrics = prepared.metrics | await _one_update(trainer, examples, config)
        else:
            metrics = prepared.metrics | {"loss": 0.0, "tokens_scored": 0.0, "no_signal": 1.0}
        metrics |= {"learning_rate": config.learning_rate, "seconds_train": time.monotonic() - started}
        started = time.monotonic()
        run.samplers[current + 1], step = await self._publish(run.store, trainer, current + 1, metrics, attach)
        synced = {"seconds_sync": time.monotonic() - started}
        run.store.record(step.number, synced)
        run.trainer = trainer
        keep = {step.number, current} | model.leased_steps()
        for old in set(run.samplers) - keep:
            del run.samplers[old]
        model._advance(step.number)
        return TrainResult(step.number, metrics | synced, step.path)

    async def complete(self, model: TrainableModel, body: bytes) -> dict[str, Any]:
        """The endpoint's answer to one chat completion request. Raises RequestError."""
        run, request = self.run_info(model), chat_format.ChatRequest.read(body)
        owner, _, number = request.model.rpartition("@")
        sampler = run.samplers.get(int(number)) if owner == model.name and number.isdecimal() else None
        if sampler is None:
            raise RequestError(404, f"the model {request.model!r} does not exist: ask for model.inference_name()")
        if request.tools and run.spec.tool_call_parser != "hermes":
            raise RequestError(
                400, f"tools are not supported for {run.spec.key}: only calls in the Hermes format are parsed here"
            )
        prompt = chat_format.render(request, run.tokenizer)
        how = request.sampling
        settings = _sdk().SamplingParams(
            max_tokens=request.max_completion_tokens or request.max_tokens,
            temperature=how["temperature"],
            top_p=how["top_p"],
            top_k=int(how["top_k"]) or -1,
            seed=request.seed,
        )
        inputs = _sdk().ModelInput.from_ints(prompt)
        try:
            reply = await _answer(
                sampler.sample(inputs, request.n or 1, settings), "sampling", deadlines.TINKER_SAMPLE_S
            )
        except TrainerError as error:
            raise RequestError(502, str(error)) from None
        choices = []
        for index, sampled in enumerate(reply.sequences):
            if sampled.logprobs is None:
                raise RequestError(502, "Tinker sampled without log-probabilities")
            tokens, stopped = list(sampled.tokens), sampled.stop_reason == "stop"
            choices.append(chat_format.choice(request, run.tokenizer, prompt, tokens, sampled.logprobs, stopped, index))
        return chat_format.completion(request, choices)

    async def recover(self, model: TrainableModel) -> bool:
        """The service's servers are its own to restart."""
        return False

    async def problem(self, model: TrainableModel) -> str:
        """The service says itself, in its answers, what is wrong."""
        return ""

    async def load(self, model: TrainableModel) -> ServerLoad | None:
        """The service does not say how full it is."""
        return None

    async def close(self) -> None:
        """Close endpoints and end the session with the service; published steps stay. Safe to call
        twice.
        """
        runs, self._runs = self._runs, {}
        for model, run in runs.items():
            await model._released()
            await asyncio.to_thread(run.endpoint.close)
            run.store.close()
        service, self._service = self._service, None
        if service is not None:
            await _answer(service.close("success"), "the end of the session", deadlines.TINKER_CLOSE_S)


async def _one_update(trainer: Any, examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
    """Forward, backward, the checks of what the service computed, and the optimizer's step. Returns
    metrics.
    """
    low, high = config.clip_range
    passed = trainer.forward_backward(
        [_datum(example.inputs_T, loss_inputs(example, config.loss)) for example in examples],
        config.loss,
        loss_fn_config={"clip_low_threshold": low, "clip_high_threshold": high},
    )
    output = await _answer(passed, "the forward and backward pass", deadlines.TINKER_CALL_S)
    metrics = step_metrics(examples, output, config)
    await _answer(trainer.optim_step(_adam(config)), "the optimizer step", deadlines.TINKER_CALL_S)
    return metrics | {"no_signal": 0.0}


def _endpoint(backend: TinkerBackend, model: TrainableModel) -> ChatEndpoint:
    def models() -> list[str]:
        return [f"{model.name}@{step}" for step in sorted(backend.run_info(model).samplers, reverse=True)]

    return ChatEndpoint(lambda body: backend.complete(model, body), models)


def _sdk() -> Any:
    """The tinker package. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module("tinker")
    except ModuleNotFoundError as error:
        if error.name != "tinker":
            raise
        raise ConfigError("TinkerBackend needs the tinker package: pip install lockstep-rl[tinker]") from None


@contextmanager
def _named(what: str, deadline_s: float) -> Iterator[None]:
    """Raises TrainerError naming `what` if the service refuses it or takes too long."""
    try:
        yield
    except TimeoutError:
        raise TrainerError(f"Tinker did not finish {what} within {deadline_s:g} s") from None
    except _sdk().TinkerError as error:
        raise TrainerError(f"Tinker refused {what}: {error}") from error


async def _answer(future: Any, what: str, deadline_s: float) -> Any:
    """The answer of the service."""
    with _named(what, deadline_s):
        return await future.result_async(deadline_s)


async def _open(what: str, create: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """A new client of the service. The first one opens the session, which blocks, so each is asked
    for in a thread.
    """
    with _named(what, deadlines.TINKER_CALL_S):
        async with asyncio.timeout(deadlines.TINKER_CALL_S):
            future = await asyncio.to_thread(create, *args, **settings)
            return await future.result_async(deadlines.TINKER_CALL_S)


def _paths(step: RunCheckpoint) -> dict[str, str]:
    file = step.path / _PATHS
    if not file.is_file():
        raise StoreError(f"{file} is missing: step {step.number} was not trained by TinkerBackend")
    return json.loads(file.read_text())


def _datum(inputs_T: Any, loss_fn_inputs: dict[str, Any]) -> Any:
    sdk = _sdk()
    return sdk.Datum(model_input=sdk.ModelInput.from_ints(inputs_T.tolist()), loss_fn_inputs=loss_fn_inputs)


def _adam(config: TrainConfig) -> Any:
    beta1, beta2 = config.betas
    return _sdk().AdamParams(
        learning_rate=config.learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        grad_clip_norm=config.max_grad_norm or 0.0,
    )
