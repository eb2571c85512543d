"""Training data for the Tinker service (sequences with their targets), and metrics from the
service's answer.

The service's losses are sums over tokens. Each term is linear in the advantage (for a positive
factor) and divides by the sampling log-probability. So a token's weight over the batch's total
weight goes into its advantage, and the sum is Lockstep's loss.

Shape suffix: T tokens of a sequence without its first token. Position t of the inputs predicts
target t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.batching.packed_batch import PackedBatch, loss_divisor
from lockstep.config.base import unsupported
from lockstep.errors import DataError, MismatchError, TrainerError

if TYPE_CHECKING:
    from lockstep.config.lora import LoraConfig
    from lockstep.config.train import TrainConfig
    from lockstep.models.spec import ModelSupportSpec

_NAME = "TinkerBackend"
_LOSSES = ("cispo", "ppo", "gspo")
"""Losses that the service computes."""
_MLP_TARGETS = {"gate_proj", "up_proj", "down_proj", "experts"}
_DEFAULT_ALPHA = 32
_HALF_ULP = 2.0**-24
"""Largest relative error of a number that was rounded to fp32."""


@dataclass(frozen=True)
class Example:
    """One sequence. Where nothing was sampled, sampling logprob and advantage are 0, and so is the
    loss.
    """

    name: str
    inputs_T: np.ndarray  # int64
    targets_T: np.ndarray  # int64
    sampling_T: np.ndarray  # float32, the log-probability it was sampled with
    advantages_T: np.ndarray  # float32, times the token's share of the batch's weight
    scored_T: np.ndarray  # bool, carries loss
    current_T: np.ndarray  # bool, sampled by the step that is trained now


def check_lora(lora: LoraConfig | None, spec: ModelSupportSpec) -> dict[str, bool]:
    """The parts that the service adapts: `train_attn`, `train_mlp`, `train_unembed`. Raises
    ConfigError for what it can't do.
    """
    if lora is None:
        raise unsupported("lora", None, _NAME, "the service trains adapters only")
    if lora.alpha != _DEFAULT_ALPHA:
        raise unsupported("lora.alpha", lora.alpha, _NAME, "the service sets the adapter's scale itself, leave it out")
    for name in ("rslora", "start_from"):
        if getattr(lora, name):
            raise unsupported(f"lora.{name}", getattr(lora, name), _NAME, "the service makes the adapter itself")
    every = set(spec.default_target_modules)
    mlp = every & _MLP_TARGETS
    wanted = every if lora.target_modules is None else set(lora.target_modules)
    if wanted not in (every, mlp, every - mlp):
        raise unsupported(
            "lora.target_modules",
            lora.target_modules,
            _NAME,
            f"the service adapts all of {', '.join(sorted(every - mlp))}, all of {', '.join(sorted(mlp))}, or both",
        )
    return {"train_attn": wanted != mlp, "train_mlp": bool(wanted & mlp), "train_unembed": False}


def check_train_config(config: TrainConfig) -> None:
    """Raises ConfigError naming the first setting that the service can't honour."""
    refused = (
        ("loss", config.loss, config.loss not in _LOSSES, f"the service computes {', '.join(_LOSSES)} only"),
        ("entropy_coef", config.entropy_coef, config.entropy_coef > 0, "the service's losses have no entropy bonus"),
        ("kl_coef", config.kl_coef, config.kl_coef > 0, "the service's losses have no KL penalty"),
        (
            "old_logprobs",
            config.divides_by,
            config.divides_by != "sampling",
            "the service's losses divide by the sampling policy"
            + ("; for gspo set old_logprobs, clip_low and clip_high" if config.old_logprobs is None else ""),
        ),
        ("clip_dual", config.clip_dual, config.clip_dual is not None, "the service's ppo has no second clip"),
        ("epochs", config.epochs, config.epochs > 1, "a batch is one optimizer step"),
        ("minibatches", config.minibatches, config.minibatches > 1, "a batch is one optimizer step"),
        ("row_length", config.row_length, config.row_length is not None, "the service packs the sequences itself"),
        ("share_prefixes", False, not config.share_prefixes, "the service packs the sequences itself"),
        ("seed", config.seed, config.seed != 0, "nothing in the step is random here"),
    )
    for setting, value, wrong, why in refused:
        if wrong:
            raise unsupported(setting, value, _NAME, why)


def examples_of(batch: PackedBatch) -> list[Example]:
    """The sequences of a batch, one by one. Raises DataError for tokens that were sampled at a
    temperature other than 1.
    """
    weight = loss_divisor(batch)
    examples = []
    for number, name in enumerate(batch.sequence_ids):
        row, path = int(batch.row_Q[number]), batch.path_index(number)
        offsets = batch.scored_offsets_Q
        scored_S = np.isin(path, batch.scored_index_P[offsets[number] : offsets[number + 1]])
        temperature_S = batch.temperatures_RS[row, path]
        if (temperature_S[scored_S] != 1).any():
            raise DataError(
                f"{name} was sampled with temperature = {temperature_S[scored_S & (temperature_S != 1)][0]:g}: {_NAME} trains "
                "on temperature 1 only, since the service computes log-probabilities of the unscaled distribution"
            )
        advantage = float(batch.sequence_advantage_Q[number]) * float(batch.sequence_weight_Q[number]) / weight
        current_RS = batch.current_RS
        tokens_S = batch.tokens_RS[row, path].astype(np.int64)
        examples.append(
            Example(
                name,
                tokens_S[:-1],
                tokens_S[1:],
                np.where(scored_S, batch.logprobs_RS[row, path], 0).astype(np.float32)[1:],
                np.where(scored_S, advantage, 0).astype(np.float32)[1:],
                scored_S[1:],
                (scored_S if current_RS is None else scored_S & current_RS[row, path])[1:],
            )
        )
    return examples


def loss_inputs(example: Example, loss: str) -> dict[str, np.ndarray]:
    """`Datum.loss_fn_inputs` of the service's loss `loss`, which has our name for it."""
    inputs = {"target_tokens": example.targets_T, "logprobs": example.sampling_T, "advantages": example.advantages_T}
    if loss == "gspo":
        inputs["sequence_ratio_mask"] = example.scored_T.astype(np.float32)
    return inputs


def step_metrics(examples: Sequence[Example], output: Any, config: TrainConfig) -> dict[str, float]:
    """Metrics of a forward and backward pass, named as the engine's.

    `output`: the service's ForwardBackwardOutput.

    Raises TrainerError if an answer is missing for a target. Raises MismatchError if sampler and
    trainer disagree by more than `max_mismatch` nats per token, or `max_token_mismatch` on one
    token, over what the current step sampled.
    """
    answers = [np.asarray(outputs["logprobs"].tolist(), dtype=np.float64) for outputs in output.loss_fn_outputs]
    if [len(answer) for answer in answers] != [len(example.targets_T) for example in examples]:
        raise TrainerError("Tinker did not answer with one log-probability per target")
    if "loss:sum" not in output.metrics:
        raise TrainerError(f"Tinker gave no loss:sum, only {', '.join(sorted(output.metrics)) or 'nothing'}")
    pairs = list(zip(answers, examples, strict=True))
    drift = np.concatenate([(answer - example.sampling_T)[example.scored_T] for answer, example in pairs])
    current = np.concatenate([example.current_T[example.scored_T] for example in examples])
    if not np.isfinite(drift).all():
        raise TrainerError("Tinker computed log-probabilities that are no numbers")
    metrics = {
        "loss": float(output.metrics["loss:sum"]),
        "kl": float(np.mean(np.expm1(drift) - drift)),
        "tokens_scored": float(len(drift)),
    }
    if current.any():
        metrics["mismatch"] = float(np.abs(drift[current]).mean())
        metrics["mismatch_max"] = float(np.abs(drift[current]).max())
    if config.max_mismatch is not None and metrics.get("mismatch", 0.0) > config.max_mismatch:
        raise MismatchError(
            f"Tinker's sampler and trainer disagree by {metrics['mismatch']:.4f} nats per token on average, more than "
            f"max_mismatch = {config.max_mismatch}; the step was not taken"
        )
    if config.max_token_mismatch is not None:
        for answer, example in pairs:
            _check_tokens(answer, example, config.max_token_mismatch)
    return metrics


def _check_tokens(answer_T: np.ndarray, example: Example, limit: float) -> None:
    """Raise MismatchError for a token beyond `limit` and beyond the rounding of the sampler's
    number to fp32.
    """
    difference_T = np.abs(answer_T - example.sampling_T)
    beyond_T = difference_T - np.maximum(limit, np.abs(example.sampling_T) * _HALF_ULP)
    beyond_T = np.where(example.scored_T & example.current_T, beyond_T, -np.inf)
    token = int(beyond_T.argmax())
    if beyond_T[token] > 0:
        raise MismatchError(
            f"{example.name}, token {token + 1}: Tinker's sampler and trainer disagree by {difference_T[token]:.2e} nats, more than "
            f"max_token_mismatch = {limit:g}; the step was not taken"
        )
