"""A row's loss: the policy loss of `lockstep.algorithms.losses`, importance correction and KL penalty, with
metrics, all as sums over pairs.

The caller divides by the global weight.

A *pair* is a sampled token with a sequence that owns the token. Siblings in a prefix tree may share
a computed token. Every value here is a sum over pairs, so k micro-batches on d ranks add up exactly
to one big batch.

Shape suffixes: N scored tokens of a row, P pairs, Q sequences. All floats are in the dtype that
came in (fp32 or fp64), natural logs.

Sources: k1, k2 and k3: J. Schulman, "Approximating KL divergence" (2020); k3 as a penalty in GRPO,
arXiv 2402.03300; in the loss or in the reward: arXiv 2510.01555; corrected by the ratio: arXiv
2512.02556. Truncated importance sampling: Ionides 2008 and, between engines, "Your efficient RL
framework secretly brings you off-policy RL training" (2025). IcePop: arXiv 2510.18855.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lockstep.algorithms.losses.base import Clips, LossInputs, mean_by_sequence, rest_of_sequence, sum_by_sequence
from lockstep.batching.packed_batch import ScoredRow
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError


@dataclass(frozen=True)
class Scored:
    """The engine's values for one row's scored tokens. One device; floats in one dtype."""

    new_N: Tensor  # logprobs of the policy being trained, with gradient, logits already divided by the temperature
    sampling_N: Tensor  # the server's logprobs
    old_N: (
        Tensor  # what the importance ratio divides by: sampling_N, or the trainer's own before the first optimizer step
    )
    token_P: Tensor  # int64 -> N
    sequence_P: Tensor  # int64 -> Q
    advantage_Q: Tensor
    weight_Q: Tensor  # weight of one scored token of the sequence
    reference_N: Tensor | None = None  # logprobs of the KL reference step; needed iff kl_coef > 0
    entropy_N: Tensor | None = None  # entropy of the predicting distribution; with a gradient for an entropy bonus
    current_N: Tensor | None = None  # bool, sampled by the version that is trained now; None: all were


@dataclass(frozen=True)
class LossSums:
    """A row's loss and metrics. `loss` carries the gradient; everything else is detached scalars."""

    loss: Tensor
    sums: dict[str, Tensor]  # add over micro-batches and data-parallel ranks
    maxima: dict[str, Tensor]  # take the maximum


def kl_k1(new: Tensor, reference: Tensor) -> Tensor:
    """k1 estimate of KL(policy || reference) per token, `log new - log reference`: unbiased for
    tokens sampled from `new`, of either sign.
    """
    return new - reference


def kl_k2(new: Tensor, reference: Tensor) -> Tensor:
    """k2 estimate, `(log new - log reference)^2 / 2`: biased, but its gradient is unbiased for the
    gradient of KL(policy || reference).
    """
    return (new - reference).square() / 2


def kl_k3(new: Tensor, reference: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token, `r - 1 - log r` with r = reference/new.

    The estimate is never negative, and unbiased for tokens sampled from `new`. The penalty's gradient
    is the estimate's own, `(1 - r) d log new`, as in GRPO.
    """
    difference = reference - new
    return torch.expm1(difference) - difference


def truncated(log_weight: Tensor, floor: float, cap: float) -> Tensor:
    """Truncated importance weight `min(w, cap)`; `floor` is unused."""
    return log_weight.exp().clamp(max=cap)


def masked(log_weight: Tensor, floor: float, cap: float) -> Tensor:
    """Masked importance weight: w inside [floor, cap], else 0. With floor 0 only large weights are
    dropped; IcePop sets a floor too.
    """
    weight = log_weight.exp()
    return torch.where((weight >= floor) & (weight <= cap), weight, torch.zeros_like(weight))


def rejected(log_weight: Tensor, floor: float, cap: float) -> Tensor:
    """1 where the importance weight lies in [floor, cap], else 0."""
    weight = log_weight.exp()
    return ((weight >= floor) & (weight <= cap)).to(log_weight.dtype)


_CORRECTIONS = {"truncated": truncated, "masked": masked, "icepop": masked, "rejected": rejected}
_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def importance_weight_P(scored: Scored, config: TrainConfig) -> Tensor | None:
    """Detached weight trainer/server of each pair, or None without a correction.

    At the level of sequences it is the product over the sequence's tokens, or its geometric mean.
    """
    if config.importance_correction is None:
        return None
    log_weight_P = (scored.old_N - scored.sampling_N).detach()[scored.token_P]
    if config.corrects_by != "token":
        over = sum_by_sequence if config.corrects_by == "sequence" else mean_by_sequence
        log_weight_P = over(log_weight_P, scored.sequence_P, len(scored.weight_Q))[scored.sequence_P]
    return _CORRECTIONS[config.importance_correction](log_weight_P, *config.importance_bounds)


def _pairs(scored: Scored, config: TrainConfig) -> LossInputs:
    """What the policy loss is called with. A KL penalty in the reward has left the advantages."""
    pairs = LossInputs(
        scored.new_N[scored.token_P], scored.old_N[scored.token_P], scored.sequence_P, scored.advantage_Q
    )
    if scored.reference_N is None or config.kl_in == "loss":
        return pairs
    estimate_N = _ESTIMATORS[config.kl_estimator](scored.old_N, scored.reference_N)
    cost_P = config.kl_coef * estimate_N[scored.token_P]
    count = len(scored.advantage_Q)
    if config.policy_loss.by_sequence:
        cost_Q = sum_by_sequence(cost_P, scored.sequence_P, count)
        return replace(pairs, advantage_Q=scored.advantage_Q - cost_Q)
    return replace(pairs, cost_P=rest_of_sequence(cost_P, scored.sequence_P, count))


def _penalty_P(scored: Scored, reference_N: Tensor, config: TrainConfig) -> Tensor:
    """The KL estimate of each pair: with a gradient where it is in the loss."""
    if config.kl_in == "reward":
        return _ESTIMATORS[config.kl_estimator](scored.old_N, reference_N)[scored.token_P]
    estimate_N = _ESTIMATORS[config.kl_estimator](scored.new_N, reference_N)
    if config.kl_corrected:
        estimate_N = (scored.new_N - scored.old_N).exp() * estimate_N
    return estimate_N[scored.token_P]


def policy_loss(scored: Scored, config: TrainConfig) -> LossSums:
    """The loss of one row: a weighted sum over its pairs of policy loss, KL penalty and entropy
    bonus, with metrics as sums.

    Raises ConfigError if kl_coef > 0 and no reference logprobs came (a penalty is never silently
    off), or the other way round.
    """
    if (config.kl_coef > 0) != (scored.reference_N is not None):
        raise ConfigError(f"kl_coef = {config.kl_coef} needs reference logprobs if and only if it is above 0")
    low, high = config.clip_range
    weight_P = scored.weight_Q[scored.sequence_P]
    parameters = {**config.policy_loss.parameters, **config.loss_parameters}
    clips = Clips(low, high, config.dual_clip, parameters)
    loss_P, clipped_P = config.policy_loss.function(_pairs(scored, config), clips)
    sums = _base_sums(scored, weight_P, clipped_P)
    correction_P = importance_weight_P(scored, config)
    if correction_P is not None:
        loss_P = loss_P * correction_P
        sums["importance"] = correction_P.sum()
        sums["importance_zeroed"] = (correction_P == 0).sum().to(weight_P.dtype)
    loss = (weight_P * loss_P).sum()
    sums["loss_policy"] = loss.detach()
    if scored.reference_N is not None:
        penalty = (weight_P * _penalty_P(scored, scored.reference_N, config)).sum()
        sums["kl_reference"] = penalty.detach()
        if config.kl_in == "loss":
            loss = loss + config.kl_coef * penalty
    if config.entropy_coef > 0:
        if scored.entropy_N is None:
            raise ConfigError(f"entropy_coef = {config.entropy_coef} needs the entropy of each token")
        loss = loss - config.entropy_coef * (weight_P * scored.entropy_N[scored.token_P]).sum()
    sums["loss"] = loss.detach()
    return LossSums(loss, sums, _maxima(scored))


def _base_sums(scored: Scored, weight_P: Tensor, clipped_P: Tensor) -> dict[str, Tensor]:
    new_N = scored.new_N.detach()
    sums = {
        "weight": weight_P.sum(),
        "pairs": new_N.new_tensor(float(len(weight_P))),
        "tokens": new_N.new_tensor(float(len(new_N))),
        "clipped": clipped_P.sum().to(new_N.dtype),
        "ratio": (new_N - scored.old_N).exp().sum(),
    }
    if scored.entropy_N is not None:
        sums["entropy"] = scored.entropy_N.detach().sum()
    return sums | compared_sums(scored)


def compared_sums(scored: Scored) -> dict[str, Tensor]:
    """The distance of the server's log-probabilities from these, as sums. Tokens that no server
    sampled (of supervised steps) don't count.

    Only those of the weights before the first update compare the server with the trainer.
    """
    known_N = scored.sampling_N.isfinite()
    drift_N = (scored.new_N.detach() - scored.sampling_N).where(known_N, 0.0)
    importance_N = drift_N.exp() * known_N
    kl_N = torch.expm1(drift_N) - drift_N  # k3
    current_N = _current(scored)
    return {
        "compared": known_N.sum().to(drift_N.dtype),
        "importance_raw": importance_N.sum(),
        "importance_squared": importance_N.square().sum(),
        "kl": kl_N.sum(),  # tokens were sampled from `sampling`: KL(sampling || new)
        "current": current_N.sum(),
        "drift_abs": (drift_N.abs() * current_N).sum(),
        "sampling_abs": (scored.sampling_N.abs().where(known_N, 0.0) * current_N).sum(),
        "drift_kl": (kl_N * current_N).sum(),
    }


def _current(scored: Scored) -> Tensor:
    """1 for tokens that tell what server and trainer compute differently, 0 for older ones, where
    the policy moved too, and for tokens that no server sampled.
    """
    known_N = scored.sampling_N.isfinite()
    current_N = known_N if scored.current_N is None else scored.current_N & known_N
    return current_N.to(scored.sampling_N.dtype)


def _maxima(scored: Scored) -> dict[str, Tensor]:
    new_N = scored.new_N.detach()
    ratio = (new_N - scored.old_N).exp().max() if len(new_N) else new_N.new_zeros(())
    return {"ratio_max": ratio} | compared_maxima(scored)


def compared_maxima(scored: Scored) -> dict[str, Tensor]:
    """The largest difference between trainer and server on a token that the trained step sampled."""
    new_N = scored.new_N.detach()
    if not len(new_N):
        return {"mismatch_max": new_N.new_zeros(())}
    drift_N = (new_N - scored.sampling_N).where(scored.sampling_N.isfinite(), 0.0)
    return {"mismatch_max": (drift_N.abs() * _current(scored)).max()}


def reduce_sums(parts: Sequence[LossSums]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(sums, maxima) over this rank's micro-batches. All-reduce both (SUM, MAX) before
    `finish_metrics`.

    Raises ValueError for an empty list: every rank takes part with at least one row, if need be of
    padding.
    """
    if not parts:
        raise ValueError("no micro-batch to reduce")
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
    maxima = {name: torch.stack([part.maxima[name] for part in parts]).max() for name in parts[0].maxima}
    return sums, maxima


def finish_metrics(sums: Mapping[str, Tensor | float], maxima: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Metrics of a step from its global sums, over all its updates.

    loss, loss_policy, kl_reference: means over pairs by weight. clip_fraction: share of pairs whose
    weight or gradient was clipped. kl: k3 estimate of KL(sampling policy || scored policy), nats
    per token. mismatch: mean |log-probability difference| between trainer and server, nats, over
    the tokens that the step trained now has sampled. In older tokens the policy's own change would
    show; without any there is no such metric. mismatch_pct: the same over the mean
    |log-probability|, in percent. mismatch_max: the largest difference. mismatch_kl: `kl` over the
    same tokens. ess: effective sample size of the importance weights trainer/server, as a share of
    the tokens (1: on-policy). entropy: nats per token. ratio_mean, ratio_max: new/old.
    rollout_top1_overlap, rollout_top20_overlap: share of the server's most likely tokens that are
    also the trainer's (`batching/top_logprobs.py`). They cover the same tokens as `mismatch`, where
    rollouts bring them.
    """
    value = {name: float(total) for name, total in sums.items()}
    weight, tokens, pairs, compared = (value[name] or 1.0 for name in ("weight", "tokens", "pairs", "compared"))
    metrics = {
        "loss": value["loss"] / weight,
        "loss_policy": value["loss_policy"] / weight,
        "clip_fraction": value["clipped"] / pairs,
        "ratio_mean": value["ratio"] / tokens,
        "tokens_scored": value["tokens"],
    }
    if value["compared"]:
        metrics["kl"] = value["kl"] / compared
        metrics["ess"] = value["importance_raw"] ** 2 / (compared * value["importance_squared"] or 1.0)
    tops = {name: float(top) for name, top in maxima.items()}
    if value["current"]:
        metrics["mismatch"] = value["drift_abs"] / value["current"]
        metrics["mismatch_pct"] = 100 * value["drift_abs"] / (value["sampling_abs"] or 1.0)
        metrics["mismatch_kl"] = value["drift_kl"] / value["current"]
    else:
        del tops["mismatch_max"]
    if value.get("top_tokens"):
        metrics["rollout_top1_overlap"] = value["top1"] / value["top_tokens"]
        metrics["rollout_top20_overlap"] = value["top20"] / value["top_tokens"]
    if "entropy" in value:
        metrics["entropy"] = value["entropy"] / tokens
    if "kl_reference" in value:
        metrics["kl_reference"] = value["kl_reference"] / weight
    if "importance" in value:
        metrics["importance_mean"] = value["importance"] / pairs
        metrics["importance_zeroed"] = value["importance_zeroed"] / pairs
    return metrics | tops


def scored_tensors(
    row: ScoredRow,
    new_N: Tensor,
    entropy_N: Tensor | None = None,
    old_N: Tensor | None = None,
    reference_N: Tensor | None = None,
) -> Scored:
    """Put a row's numpy side on the device and dtype of `new_N`. `old_N` None: the ratio divides by
    the server's logprobs.
    """

    def floats(values: object) -> Tensor:
        return torch.as_tensor(values).to(device=new_N.device, dtype=new_N.dtype)

    sampling_N = floats(row.sampling_N)
    return Scored(
        new_N=new_N,
        sampling_N=sampling_N,
        old_N=sampling_N if old_N is None else old_N.detach(),
        token_P=torch.as_tensor(row.token_P).to(new_N.device),
        sequence_P=torch.as_tensor(row.sequence_P).to(new_N.device),
        advantage_Q=floats(row.advantage_Q),
        weight_Q=floats(row.weight_Q),
        reference_N=None if reference_N is None else reference_N.detach(),
        entropy_N=entropy_N,
        current_N=None if row.current_N is None else torch.as_tensor(row.current_N).to(new_N.device),
    )
