"""The distance between the scored policy and the sampling policy: pure functions of
log-probabilities, top tokens and routed experts.

The same functions compare the trainer with the server, the adapter's delta with the server's, and
the server with itself. The last is the server's own noise: generate, then score again.

Shape suffixes: T tokens, V most likely tokens of one position, L mixture-of-experts layers, K
experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lockstep.errors import DataError


@dataclass(frozen=True)
class LogprobMismatch:
    """Differences of log-probabilities of the same tokens, in nats.

    mean_abs_pct: mean |difference| over mean |reference|, in percent.
    kl: k3 estimate of KL(reference policy || other), nats per token, for tokens the reference
        sampled.
    """

    tokens: int
    mean_abs: float
    mean_abs_pct: float
    mean: float
    p50: float
    p95: float
    p99: float
    largest: float
    kl: float

    def as_metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items()}


def logprob_mismatch(reference_T: np.ndarray, other_T: np.ndarray) -> LogprobMismatch:
    """Compare log-probabilities of tokens that the reference sampled. Raises DataError if lengths
    differ, or a value is not finite.
    """
    reference_T, other_T = np.asarray(reference_T, dtype=np.float64), np.asarray(other_T, dtype=np.float64)
    if reference_T.shape != other_T.shape or reference_T.ndim != 1 or not len(reference_T):
        raise DataError(f"can't compare {reference_T.shape} with {other_T.shape} log-probabilities")
    if not (np.isfinite(reference_T).all() and np.isfinite(other_T).all()):
        raise DataError("can't compare log-probabilities that are not finite")
    difference_T = other_T - reference_T
    size_T = np.abs(difference_T)
    scale = np.abs(reference_T).mean()
    return LogprobMismatch(
        tokens=len(reference_T),
        mean_abs=float(size_T.mean()),
        mean_abs_pct=float(100 * size_T.mean() / scale) if scale else 0.0,
        mean=float(difference_T.mean()),
        p50=float(np.quantile(size_T, 0.5)),
        p95=float(np.quantile(size_T, 0.95)),
        p99=float(np.quantile(size_T, 0.99)),
        largest=float(size_T.max()),
        kl=float((np.expm1(difference_T) - difference_T).mean()),
    )


def top_overlap(reference_TV: np.ndarray, other_TV: np.ndarray, count: int) -> float:
    """How many of the reference's most likely tokens are among the other's: a mean share, 0 to 1.

    reference_TV, other_TV: token ids at each position, the most likely first.
    count: of ids that are compared at each position.

    Raises DataError where one of the two has fewer.
    """
    first, second = reference_TV[:, :count], other_TV[:, :count]
    if first.shape != second.shape or first.shape[1] != count or not len(first):
        raise DataError(f"can't compare the top {count} of {reference_TV.shape} with those of {other_TV.shape}")
    return float((first[:, :, None] == second[:, None, :]).any(axis=2).mean())


def top_kl(first: Sequence[Mapping[int, float]], second: Sequence[Mapping[int, float]]) -> np.ndarray:
    """float `[T]`: KL(first || second) in nats, over the most likely tokens that both list. The rest
    of the vocabulary counts as one token, so that the result is a lower bound.

    first, second: by place, log-probabilities by token id.
    """
    if len(first) != len(second) or not len(first):
        raise DataError(f"can't compare the most likely tokens of {len(first)} places with those of {len(second)}")
    return np.array([_top_kl(p, q) for p, q in zip(first, second, strict=True)])


def _top_kl(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    shared = sorted(first.keys() & second.keys())
    p_V, q_V = (np.exp([entries[token] for token in shared]) for entries in (first, second))
    p_V, q_V = (np.maximum([*values, 1 - sum(values)], 1e-9) for values in (p_V, q_V))
    # Both sums are 1 but for rounding; p log(p / q) - p + q has no first-order error from that.
    return float((p_V * np.log(p_V / q_V) - p_V + q_V).sum())


def expert_choices_that_differ(reference_TLK: np.ndarray, other_TLK: np.ndarray) -> float:
    """Share of the reference's expert choices that the other did not make, 0 to 1. Order within a
    token's top-k does not matter.
    """
    if reference_TLK.shape != other_TLK.shape or reference_TLK.ndim != 3 or not reference_TLK.size:
        raise DataError(f"can't compare routed experts of shape {reference_TLK.shape} with {other_TLK.shape}")
    kept = (reference_TLK[..., :, None] == other_TLK[..., None, :]).any(axis=-1)
    return float(1 - kept.mean())
