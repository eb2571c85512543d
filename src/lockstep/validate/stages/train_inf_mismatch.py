"""Stage train_inf_mismatch: how far the trainer's policy is from the one the server sampled from.

The server samples, with the base model and with a random adapter (of a run: with the run's own).
Then the same tokens are scored three times: by the server again (its own noise), and by the trainer
on the server's experts. For a mixture of experts, the trainer also scores them on its own experts.

Shape suffixes: S tokens of a sequence, T sampled tokens of all sequences, V most likely tokens, L
layers, K experts.
"""

from __future__ import annotations

import asyncio
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
from lockstep.inference.client import Server, most_likely
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.environment.locate import default_kind
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.metrics.mismatch import logprob_mismatch, top_overlap
from lockstep.models.checkpoint.hub import checkpoint_folder
from lockstep.models.config import checkpoint_dtype
from lockstep.models.registry import get_model_support_spec, load_model_config
from lockstep.trainer.client import Trainer
from lockstep.trainer.protocol import EngineConfig, Score, from_json
from lockstep.validate.stage import Comparison, Report, Request
from lockstep_wire import http_paths

_PROMPT_ROOM = 128
_BASE, _ADAPTER = "validate@base", "validate@adapter"
COLUMNS = {
    "mean_abs": "|Δlogp|",
    "mean_abs_pct": "in %",
    "kl": "KL",
    "largest": "largest",
    "top1": "top-1",
    "top20": "top-20",
    "expert_choices_differ": "router",
}
"""Means over the sampled tokens, in nats: |Δlogp|, also in percent of mean |logp|; KL (k3); the
largest |Δlogp|. Shares: most likely tokens that are the same; `router`: replayed choices that the
trainer's own router would not have made.
"""
LARGEST = {"float32": 1e-4, "bfloat16": float("inf")}
KL = {"float32": 1e-6, "bfloat16": 1e-3}
"""Limits of the trainer against the server, per token in nats. Where both compute in fp32 they
agree on every token. In bf16 the rounding of two programs shows, but not in the policy.
"""
ADVICE = {
    "float32": "outside: trainer and server compute different policies, and in float32 rounding is no "
    "reason; don't train this model here",
    "bfloat16": "outside: run again with --dtype float32; within there, it is bfloat16's rounding, which "
    "each step reports as mismatch; outside there too, don't train",
}
"""For a model outside the limits, by dtype."""
_THINGS = ("a river", "the number seven", "a bicycle", "winter", "a library", "salt", "the moon", "a violin")
_ASKS = ("Describe {} in a few words:", "Write down what you know about {}.", "Once there was {},", "def about({!r}):")


@dataclass(frozen=True)
class Sample:
    """One sampled sequence: ids, the sampled tokens' log-probabilities, per token its most likely
    ids, and its routed experts.
    """

    prompt: list[int]
    sampled: list[int]
    logprobs: list[float]
    top: list[list[int]]
    experts_SLK: np.ndarray | None

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.sampled


async def run(request: Request) -> Report:
    """See the module. Raises what the server, the trainer or the model's family raises, and
    DataError for lost routed experts.
    """
    base = checkpoint_folder(request.base_model)
    request = replace(request, dtype=request.dtype or checkpoint_dtype(base))
    shape = routed_experts_shape(load_model_config(str(base)))
    adapter = await asyncio.to_thread(_adapter, base, request)
    samples, comparisons = await _served(base, adapter, shape, request)
    for name, folder in ((_BASE, None), (_ADAPTER, adapter)):
        request.say(f"scoring with the trainer: {_policy(name)}")
        comparisons += await _trained(base, folder, name, samples[name], request)
    limits = (
        f"trainer against server: KL <= {KL[str(request.dtype)]:g}, largest <= {LARGEST[str(request.dtype)]:g} nats"
    )
    comparisons.sort(key=lambda row: row.policy != "base")
    return Report(
        "train_inf_mismatch",
        request.base_model,
        str(request.dtype),
        COLUMNS,
        limits,
        comparisons,
        ADVICE[str(request.dtype)],
    )


def _policy(name: str) -> str:
    return name.partition("@")[2]


def _adapter(base: Path, request: Request) -> Path:
    if request.adapter is not None:
        return request.adapter
    from lockstep.validate.random_adapter import write_random_adapter

    return write_random_adapter(base, request.folder / "adapter", request.seed, str(request.dtype))


async def _served(
    base: Path, adapter: Path, shape: RoutedExpertsShape | None, request: Request
) -> tuple[dict[str, list[Sample]], list[Comparison]]:
    """The samples of both policies, and the rows of the server's own noise."""
    kind = default_kind()
    server = await launch(
        _server_config(base, shape is not None, kind, request), find_runtime(kind), request.folder, request.say
    )
    samples: dict[str, list[Sample]] = {}
    comparisons = []
    try:
        await server.load_adapter(_ADAPTER, adapter)
        for name in (_BASE, _ADAPTER):
            request.say(f"sampling {request.prompts} x {request.tokens} tokens: {_policy(name)}")
            samples[name] = await asyncio.gather(
                *(_sample(server, name, number, shape, request) for number in range(request.prompts))
            )
            again = await asyncio.gather(*(_score_again(server, name, sample) for sample in samples[name]))
            comparisons.append(_noise(name, samples[name], again))
    finally:
        await server.close()
    return samples, comparisons


def _server_config(base: Path, capture: bool, kind: str, request: Request) -> ServerConfig:
    """What the run serves with, if a run is validated, or the model by itself, for the sequences of this stage."""
    from lockstep.validate.random_adapter import RANK

    asked = request.server or ServerConfig(model=base, served_name=_BASE)
    lora = asked.lora or LoraServing(max_rank=RANK, targets=get_model_support_spec(str(base)).default_target_modules)
    changes: dict[str, object] = {
        "served_name": _BASE,
        "dtype": request.dtype,
        "lora": lora,
        "max_model_len": max(_PROMPT_ROOM + request.tokens + 1, asked.max_model_len if request.server else 0),
        "capture_routed_experts": capture,
        "gpus": (0,) if kind == "cuda" else (),  # it has ended when the trainer starts
        "seed": request.seed,
        "extra_args": request.server_args,
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


def _most_likely(entry: dict[str, float]) -> list[int]:
    """Ids of the TOP most likely tokens, from {"token_id:5": log-probability}."""
    ordered = sorted(entry, key=lambda token: -entry[token])[:TOP]
    return [int(token.removeprefix("token_id:")) for token in ordered]


async def _score_again(server: Server, name: str, sample: Sample) -> tuple[list[float], list[list[int]]]:
    """(log-probability of each sampled token, the most likely ids there), the whole sequence
    computed afresh.
    """
    logprobs, choice = await server.score_choice(name, sample.ids, TOP)
    count = len(sample.sampled)
    return logprobs[-count:], most_likely(choice, TOP)[-count:]


def _noise(name: str, samples: list[Sample], again: list[tuple[list[float], list[list[int]]]]) -> Comparison:
    values = _compare(samples, [logprobs for logprobs, _ in again])
    values |= _overlap(samples, np.array([top for _, tops in again for top in tops]))
    return Comparison(_policy(name), "server again", values)


def _overlap(samples: list[Sample], other_TV: np.ndarray) -> dict[str, float]:
    """Shares of the most likely tokens that are the same, one and twenty of them."""
    sampled_TV = np.array([top for sample in samples for top in sample.top])
    return {"top1": top_overlap(sampled_TV, other_TV, 1), "top20": top_overlap(sampled_TV, other_TV, TOP)}


def _compare(samples: list[Sample], scored: list[list[float]]) -> dict[str, float]:
    sampled_T = np.concatenate([sample.logprobs for sample in samples])
    return logprob_mismatch(sampled_T, np.concatenate(scored)).as_metrics()


async def _trained(
    base: Path, adapter: Path | None, name: str, samples: list[Sample], request: Request
) -> list[Comparison]:
    settings = from_json(
        EngineConfig,
        {"model": str(base), "adapter": adapter and str(adapter), "dtype": request.dtype, "trains": False},
        "lockstep validate",
    )
    gpus = (0,) if default_kind() == "cuda" else ()
    trainer = await Trainer.start(settings, 1, request.folder / "logs" / "trainer.log", gpus=gpus)
    moe = samples[0].experts_SLK is not None
    ways = {"trainer, replay": True, "trainer, own choices": False} if moe else {"trainer": False}
    comparisons = []
    try:
        for what, replay in ways.items():
            values = await _scores(trainer, samples, replay, request.folder)
            limited = replay or not moe
            within = values["kl"] <= KL[str(request.dtype)] and values["largest"] <= LARGEST[str(request.dtype)]
            comparisons.append(Comparison(_policy(name), what, values, within if limited else None))
    finally:
        await trainer.close()
    return comparisons


async def _scores(trainer: Trainer, samples: list[Sample], replay: bool, folder: Path) -> dict[str, float]:
    sequences = [
        scoring_sequence(f"sequence {number}", sample.ids, sample.experts_SLK if replay else None)
        for number, sample in enumerate(samples)
    ]
    batch = pack(sequences, np.zeros(len(samples)), np.ones(len(samples)))
    path, out = folder / "batch.safetensors", folder / "scores.safetensors"
    await asyncio.to_thread(save_batch, batch, path)
    reply = await trainer.call(Score(path, out, TOP), deadline_s=deadlines.SCORING_S)
    scores = load_file(out)
    values = _compare(samples, [sampled.tolist() for sampled in _of_sampled(samples, batch, scores["logprobs_RS"])])
    values |= _overlap(samples, np.concatenate(_of_sampled(samples, batch, scores["top_RSC"])))
    return (
        values
        if reply.expert_choices_differ is None
        else values | {"expert_choices_differ": reply.expert_choices_differ}
    )


def _of_sampled(samples: list[Sample], batch: PackedBatch, values_RS: np.ndarray) -> list[np.ndarray]:
    """Each sequence's values at its sampled tokens."""
    sequence_values = unpack_scores(batch, values_RS)
    return [values[-len(sample.sampled) :] for sample, values in zip(samples, sequence_values, strict=True)]
