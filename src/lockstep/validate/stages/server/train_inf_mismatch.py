"""Stage train_inf_mismatch: how far the trainer's policy is from the one the server sampled from.

The server samples, with the base model and with a random adapter (of a run: with the run's own).
Then the same tokens are scored three times: by the server again (its own noise), and by the trainer
on the server's experts. For a mixture of experts, the trainer also scores them on its own experts.

Shape suffixes: S tokens of a sequence, T sampled tokens of all sequences, V most likely tokens, L
layers, K experts.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from lockstep.backends.megatron.plan.settings import routed_experts_shape
from lockstep.batching.pack import pack, save_batch
from lockstep.batching.packed_batch import PackedBatch, unpack_scores
from lockstep.batching.prefix_tree import scoring_sequence
from lockstep.batching.routed_experts import RoutedExpertsShape, decode_routed_experts
from lockstep.batching.top_logprobs import TOP
from lockstep.config import deadlines
from lockstep.errors import ConfigError
from lockstep.inference.client import Server, best, most_likely_logprobs
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.metrics.mismatch import logprob_mismatch, top_kl, top_overlap
from lockstep.models.config import checkpoint_dtype
from lockstep.models.registry import get_model_support_spec, load_model_config
from lockstep.trainer.client import Trainer
from lockstep.trainer.protocol import EngineConfig, Score, from_json
from lockstep.validate.figures import Figure, Outcome, count, figure, judged
from lockstep.validate.request import Request
from lockstep.validate.tolerances import limit_of
from lockstep_wire import http_paths

_PROMPT_ROOM = 128
_BASE, _ADAPTER = "validate@base", "validate@adapter"
_AGAIN = "server again"
Scored = tuple[list[float], list[dict[int, float]]]
"""Of a sequence's sampled tokens: log-probabilities, and those of the most likely ids in their places."""
ADVICE = {
    "float32": "outside: trainer and server compute different policies, and in float32 rounding is no "
    "reason; don't train this model here",
    "bfloat16": "outside: run again with --dtype float32; within there, it is bfloat16's rounding, which "
    "each step reports as mismatch; outside there too, don't train",
}
"""For a model outside the limits, by dtype."""
_MOST_POINTS = 1500
"""Of the scatter plot."""
_THINGS = ("a river", "the number seven", "a bicycle", "winter", "a library", "salt", "the moon", "a violin")
_ASKS = ("Describe {} in a few words:", "Write down what you know about {}.", "Once there was {},", "def about({!r}):")


@dataclass(frozen=True)
class Sample:
    """One sampled sequence: ids, the sampled tokens' log-probabilities, per token the most likely
    ids with theirs, and its routed experts.
    """

    prompt: list[int]
    sampled: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]
    experts_SLK: np.ndarray | None

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.sampled


@dataclass(frozen=True)
class Job:
    """A request with what a run adds: its dtype, its server's settings and its adapter."""

    request: Request
    base: Path
    dtype: str
    server: ServerConfig | None = None
    adapter: Path | None = None


async def run(request: Request) -> Outcome:
    """Run the stage that this module describes.

    Raises the errors of the server, the trainer and the model's family, and DataError where a reply
    lacks its routed experts.
    """
    with ExitStack() as kept:
        job = _job(request, kept)
        shape = routed_experts_shape(load_model_config(str(job.base)))
        adapter = await asyncio.to_thread(_adapter, job)
        samples, figures = await _served(adapter, shape, job)
        points = {}
        for name, folder in ((_BASE, None), (_ADAPTER, adapter)):
            request.say(f"scoring with the trainer: {_policy(name)}")
            again = next(f.mean for f in figures if f.name == f"{_policy(name)}, {_AGAIN}: KL")
            measured, points[_policy(name)] = await _trained(folder, name, samples[name], job, again)
            figures += measured
    outcome = judged(figures, [f"dtype {job.dtype}"], {"logprob scatter": points})
    advice = "" if outcome.status == "passed" else f"; {ADVICE[job.dtype]}"
    return replace(outcome, reason=outcome.reason + advice)


def _job(request: Request, kept: ExitStack) -> Job:
    """For a run: its last step, which no process removes until `kept` ends.

    Raises StoreError for a run without a step, and ConfigError for another dtype than the run's.
    """
    if request.run is None:
        return Job(request, request.base_model, request.dtype or checkpoint_dtype(request.base_model))
    from lockstep.backends.megatron.launch import serving_of
    from lockstep.runs.retention import reading

    server, checkpoint = serving_of(request.run.resolve(), None)
    kept.enter_context(reading(checkpoint))
    if request.dtype not in (None, server.dtype):
        raise ConfigError(f"--dtype {request.dtype}: the run trains in {server.dtype}; leave it out")
    return Job(request, server.model, server.dtype, server, checkpoint.adapter if server.lora else None)


def _policy(name: str) -> str:
    return name.partition("@")[2]


def _adapter(job: Job) -> Path:
    if job.adapter is not None:
        return job.adapter
    from lockstep.validate.random_adapter import write_random_adapter

    return write_random_adapter(job.base, job.request.folder / "adapter", job.request.seed, job.dtype)


async def _served(
    adapter: Path, shape: RoutedExpertsShape | None, job: Job
) -> tuple[dict[str, list[Sample]], list[Figure]]:
    """The samples of both policies, and the figures of the server's own noise."""
    request = job.request
    config = _server_config(shape is not None, job)
    server = await launch(config, find_runtime(request.device), request.folder, request.say)
    samples: dict[str, list[Sample]] = {}
    figures = []
    try:
        await server.load_adapter(_ADAPTER, adapter)
        for name in (_BASE, _ADAPTER):
            request.say(f"sampling {request.prompts} x {request.tokens} tokens: {_policy(name)}")
            samples[name] = await asyncio.gather(
                *(_sample(server, name, number, shape, request) for number in range(request.prompts))
            )
            again = await asyncio.gather(*(_score_again(server, name, sample) for sample in samples[name]))
            figures += _compare(f"{_policy(name)}, {_AGAIN}", samples[name], again)
    finally:
        await server.close()
    return samples, figures


def _server_config(capture: bool, job: Job) -> ServerConfig:
    """What the run serves with, if a run is validated, or the model by itself, for the sequences of this stage."""
    from lockstep.validate.random_adapter import RANK

    request = job.request
    asked = job.server or ServerConfig(model=job.base, served_name=_BASE)
    targets = get_model_support_spec(str(job.base)).default_target_modules
    changes: dict[str, object] = {
        "served_name": _BASE,
        "dtype": job.dtype,
        "lora": asked.lora or LoraServing(max_rank=RANK, targets=targets),
        "max_model_len": max(_PROMPT_ROOM + request.tokens + 1, asked.max_model_len if job.server else 0),
        "capture_routed_experts": capture,
        "gpus": (0,) if request.device == "cuda" else (),  # it has ended when the trainer starts
        "seed": request.seed,
        "extra_args": asked.extra_args or request.server_args,
    }
    return asked.model_copy(update=changes)


def prompt(number: int) -> str:
    """The text that sequence `number` continues."""
    return _ASKS[number // len(_THINGS) % len(_ASKS)].format(_THINGS[number % len(_THINGS)])


async def _sample(server: Server, name: str, number: int, shape: RoutedExpertsShape | None, request: Request) -> Sample:
    body = {
        "model": name,
        "prompt": prompt(number),
        "max_tokens": request.tokens,
        "ignore_eos": True,
        "seed": request.seed + number,
        "logprobs": TOP,
        "return_tokens_as_token_ids": True,
    }
    choice = (await server.call("POST", http_paths.COMPLETIONS, body, deadline_s=deadlines.SCORING_S)).json()[
        "choices"
    ][0]
    ids, sampled = choice["prompt_token_ids"], choice["token_ids"]
    experts_SLK = None
    if shape is not None:
        experts_SLK = decode_routed_experts(
            choice.get("routed_experts"), choice.get("routed_experts_digest"), ids, sampled, shape, f"sequence {number}"
        )
    logprobs = choice["logprobs"]
    top = [_most_likely(entry) for entry in logprobs["top_logprobs"]]
    return Sample(ids, sampled, logprobs["token_logprobs"], top, experts_SLK)


def _most_likely(entry: dict[str, float]) -> dict[int, float]:
    """The TOP most likely tokens, from {"token_id:5": log-probability}."""
    return best({int(token.removeprefix("token_id:")): logprob for token, logprob in entry.items()}, TOP)


async def _score_again(server: Server, name: str, sample: Sample) -> Scored:
    """The whole sequence computed afresh."""
    logprobs, choice = await server.score_choice(name, sample.ids, TOP)
    count = len(sample.sampled)
    return logprobs[-count:], most_likely_logprobs(choice, TOP)[-count:]


def _compare(
    label: str,
    samples: list[Sample],
    again: list[Scored],
    limits: dict[str, float] | None = None,
) -> list[Figure]:
    """Figures of log-probabilities and most likely tokens against the samples'. limits: by figure;
    None: shown only.
    """
    sampled_T = np.concatenate([sample.logprobs for sample in samples])
    values = logprob_mismatch(sampled_T, np.concatenate([logprobs for logprobs, _ in again])).as_metrics()
    differences_T = np.abs(np.concatenate([logprobs for logprobs, _ in again]) - sampled_T)
    places = [f"sequence {n}, token {t}" for n, sample in enumerate(samples) for t in range(len(sample.sampled))]
    sampled = [top for sample in samples for top in sample.top]
    other = [top for _, tops in again for top in tops]
    sampled_TV, other_TV = (np.array([list(top) for top in tops]) for tops in (sampled, other))
    limits = limits or {}
    shares = {f"most likely {n}": 1 - top_overlap(sampled_TV, other_TV, n) for n in (1, TOP)}
    return [
        figure(f"{label}: |difference|", differences_T.tolist(), places, limits.get("largest"), unit="nats"),
        count(f"{label}: mean |difference|", values["mean_abs_pct"], limits.get("percent"), unit="%"),
        count(f"{label}: KL", values["kl"], limits.get("kl"), unit="nats"),
        figure(f"{label}: top-{TOP} KL", top_kl(other, sampled).tolist(), places, limits.get("top"), "mean", "nats"),
        *(count(f"{label}: {name} that differ", share, None, unit="share") for name, share in shares.items()),
    ]


def limits_for(family: str, dtype: str, again: float) -> dict[str, float]:
    """Of the trainer against the server, by figure; a token in bf16 has none.

    again: the server's KL from itself, on the same sequences.
    """
    percent = limit_of(f"mismatch percent of {family}", dtype)
    kl = max(limit_of("mismatch KL", dtype), again * limit_of("mismatch KL over the server's own", dtype))
    limits = {"percent": percent, "kl": kl, "top": limit_of("mismatch top-20 KL", dtype)}
    return limits | ({"largest": limit_of("mismatch of a token", dtype)} if dtype == "float32" else {})


async def _trained(
    adapter: Path | None, name: str, samples: list[Sample], job: Job, again: float
) -> tuple[list[Figure], list[list[float]]]:
    """(figures, points of server and trainer) of a policy. Replayed experts have limits, the
    trainer's own choices have none.
    """
    request = job.request
    settings = from_json(
        EngineConfig,
        {"model": str(job.base), "adapter": adapter and str(adapter), "dtype": job.dtype, "trains": False},
        "lockstep validate",
    )
    gpus = (0,) if request.device == "cuda" else ()
    trainer = await Trainer.start(settings, 1, request.folder / "logs" / "trainer.log", gpus=gpus)
    moe = samples[0].experts_SLK is not None
    ways = {"trainer, replay": True, "trainer, own choices": False} if moe else {"trainer": False}
    figures: list[Figure] = []
    points: list[list[float]] = []
    try:
        for way, replay in ways.items():
            label = f"{_policy(name)}, {way}"
            scored, differ = await _scores(trainer, samples, replay, request.folder)
            limits = limits_for(request.family, job.dtype, again) if replay or not moe else None
            figures += _compare(label, samples, scored, limits)
            if differ is not None:
                figures.append(count(f"{label}: expert choices that differ", differ, None, unit="share"))
            points = points or _points(samples, scored)
    finally:
        await trainer.close()
    return figures, points


def _points(samples: list[Sample], scored: list[Scored]) -> list[list[float]]:
    """[server, trainer] log-probabilities of some tokens, for the plot."""
    pairs = [
        [round(float(server), 4), round(float(trainer), 4)]
        for sample, (logprobs, _) in zip(samples, scored, strict=True)
        for server, trainer in zip(sample.logprobs, logprobs, strict=True)
    ]
    return pairs[:: max(1, len(pairs) // _MOST_POINTS)]


async def _scores(
    trainer: Trainer, samples: list[Sample], replay: bool, folder: Path
) -> tuple[list[Scored], float | None]:
    """(each sequence's scores, share of replayed choices that differ)."""
    sequences = [
        scoring_sequence(f"sequence {number}", sample.ids, sample.experts_SLK if replay else None)
        for number, sample in enumerate(samples)
    ]
    batch = pack(sequences, np.zeros(len(samples)), np.ones(len(samples)))
    path, out = folder / "batch.safetensors", folder / "scores.safetensors"
    await asyncio.to_thread(save_batch, batch, path)
    reply = await trainer.call(Score(path, out, TOP), deadline_s=deadlines.SCORING_S)
    scores = load_file(out)
    names = ("logprobs_RS", "top_RSC", "top_logprobs_RSC")
    logprobs, ids, chances = (_of_sampled(samples, batch, scores[name]) for name in names)
    scored = [
        (values.tolist(), [dict(zip(*top, strict=True)) for top in zip(rows.tolist(), likely.tolist(), strict=True)])
        for values, rows, likely in zip(logprobs, ids, chances, strict=True)
    ]
    return scored, reply.expert_choices_differ


def _of_sampled(samples: list[Sample], batch: PackedBatch, values_RS: np.ndarray) -> list[np.ndarray]:
    """Each sequence's values at its sampled tokens."""
    sequence_values = unpack_scores(batch, values_RS)
    return [values[-len(sample.sampled) :] for sample, values in zip(samples, sequence_values, strict=True)]
