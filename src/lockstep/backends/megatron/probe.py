"""The behaviour part of the verification after each sync: server and trainer score the same text,
and must agree.

How far two right programs differ depends on the model, the precision and the text, so no constant
says what is allowed. At registration both sides hold the base weights, and their difference is
measured (`Noise`). A step may differ by a stated multiple of that noise.

Rounding is relative to the logits, so that an unlikely token's log-probability is the less certain.
So a difference is divided by the token's surprisal where the surprisal exceeds one nat, and then
compared with a limit.

Shape suffixes: T scored tokens of all sequences end to end; S tokens of a sequence; V most likely
ids at a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lockstep.batching.prefix_tree import TokenSequence, scoring_sequence
from lockstep.batching.top_logprobs import TOP
from lockstep.errors import MismatchError, TrainerError
from lockstep.metrics.mismatch import top_overlap

TOKENS = 512
"""A probe takes sequences until it has this many tokens."""
ROW = 640
"""Tokens of the one row that holds every probe: a shape that never changes is compiled once."""

MULTIPLE = 5.0
"""The limits of a step's scaled mean and 90th percentile, in units of the noise on the base
weights. Over 41 right steps of a real model in bf16 their logarithms were 0.40 +- 0.15 and 0.53 +-
0.18 (docs/numerics.md). So 5 is eight and six standard deviations away. Percentiles of unscaled
differences are no measure: the 99th reached 5.9 while the policy grew sure of its replies.
"""
# Scaled differences that are always allowed: mean, 90th percentile. fp32: 1e-6 to 1e-5 between vLLM
# and Megatron-Core.
_TIGHT = {"float32": (2e-5, 1e-4), "bfloat16": (1e-3, 1e-2)}
# Mean scaled noise on base weights beyond which the two programs do not compute one model. bf16:
# 0.014 on text; fp32: up to 1e-5.
_ABSURD = {"float32": 1e-3, "bfloat16": 0.05}
# "exact": fp64 on both sides, so there is no noise; the served number's rounding to fp32, up to 32
# nats.
_EXACT_MEAN, _EXACT_LARGEST = 1e-6, 2e-6


@dataclass(frozen=True)
class ProbeScores:
    """The values that one side computes for each token after a sequence's first: its
    log-probability, and the TOP most likely ids.
    """

    logprobs_T: np.ndarray
    top_TV: np.ndarray  # integers, most likely first


@dataclass(frozen=True)
class Probe:
    """Text that both sides score. Its sequences fit one row of `ROW` tokens."""

    sequences: tuple[TokenSequence, ...]

    @classmethod
    def of_text(cls, tokens: Sequence[int], longest: int, enough: int = TOKENS) -> Probe:
        """A text's first `enough` tokens, in sequences of at most `longest`."""
        tokens = tokens[:enough]
        cuts = [tokens[start : start + longest] for start in range(0, len(tokens), longest)]
        return cls(tuple(scoring_sequence(f"probe {i}", cut) for i, cut in enumerate(cuts) if len(cut) > 1))

    @classmethod
    def of_rollouts(cls, sequences: Sequence[TokenSequence], longest: int, enough: int = TOKENS) -> Probe:
        """One rollout of each group, then another of each, until there are `enough` tokens; of long
        ones `longest` tokens.

        A rollout without routed experts may begin shortly before its first reply, since any text
        can be scored. Routed experts cover a rollout from its beginning only.
        """
        turn_of: dict[int, int] = {}
        turns = []
        for sequence in sequences:
            turn_of[sequence.group] = turn_of.get(sequence.group, -1) + 1
            turns.append((turn_of[sequence.group], sequence.group))
        chosen: list[TokenSequence] = []
        room = ROW - TOKENS + enough
        for i in sorted(range(len(sequences)), key=turns.__getitem__):
            cut = _part(sequences[i], min(longest, room))
            if len(cut) > 1:
                chosen.append(_to_score(cut, f"probe {len(chosen)}"))
                room -= len(cut)
            if room <= ROW - TOKENS:  # what is left is for the last one not to be cut short
                break
        return cls(tuple(chosen))

    @property
    def tokens(self) -> list[list[int]]:
        return [sequence.tokens_S.tolist() for sequence in self.sequences]

    @property
    def scored(self) -> int:
        return sum(len(sequence) - 1 for sequence in self.sequences)

    def with_routed_experts(self, routed_experts: Sequence[np.ndarray | None]) -> Probe:
        """The same text, to be scored on these experts."""
        pairs = zip(self.sequences, routed_experts, strict=True)
        return Probe(
            tuple(scoring_sequence(sequence.name, sequence.tokens_S.tolist(), given) for sequence, given in pairs)
        )


def _part(sequence: TokenSequence, longest: int) -> TokenSequence:
    if len(sequence) <= longest:
        return sequence
    start = 0
    if sequence.experts_SLK is None:
        start = max(0, min(int(sequence.loss_mask_S.argmax()) - longest // 4, len(sequence) - longest))
    tokens = sequence.tokens_S[start : start + longest].tolist()
    return sequence.cut(longest) if start == 0 else scoring_sequence(sequence.name, tokens)


def _to_score(sequence: TokenSequence, name: str) -> TokenSequence:
    """Every token after the first, at temperature 1, on the routed experts that the sequence has."""
    bare = scoring_sequence(name, sequence.tokens_S.tolist())
    return replace(bare, experts_SLK=sequence.experts_SLK, routed_S=sequence.routed_S)


@dataclass(frozen=True)
class Noise:
    """The difference of two programs with one policy on a text.

    mean, p99, largest: of |difference| per token, in nats.
    scaled, scaled_p90: mean and 90th percentile of |difference| / max(1, surprisal in nats).
    """

    mean: float
    p99: float
    largest: float
    scaled: float
    scaled_p90: float

    @classmethod
    def between(cls, one_T: np.ndarray, other_T: np.ndarray) -> Noise:
        """one_T, other_T: log-probabilities; the surprisal is that of the second."""
        one_T, other_T = np.asarray(one_T, np.float64), np.asarray(other_T, np.float64)
        size_T = np.abs(one_T - other_T)
        scaled_T = size_T / np.maximum(1.0, -other_T)
        tail, scaled_tail = np.quantile(size_T, 0.99), np.quantile(scaled_T, 0.9)
        return cls(float(size_T.mean()), float(tail), float(size_T.max()), float(scaled_T.mean()), float(scaled_tail))


def base_noise(served: ProbeScores, trained: ProbeScores, dtype: str, log: Path) -> Noise:
    """The noise on the base weights, which both sides loaded from the same checkpoint.

    dtype: of the weights, or "exact".

    Raises MismatchError where it is more than the precision explains.
    """
    noise = Noise.between(served.logprobs_T, trained.logprobs_T)
    if dtype == "exact":
        allowed, absurd = _EXACT_LARGEST, not (noise.mean <= _EXACT_MEAN and noise.largest <= _EXACT_LARGEST)
    else:
        allowed, absurd = _ABSURD[dtype], not noise.scaled <= _ABSURD[dtype]
    if absurd:
        raise MismatchError(
            f"on the base weights, which both loaded from the checkpoint, server and trainer differ by {noise.mean:.2e} nats a token "
            f"({noise.largest:.2e} at most, {noise.scaled:.1e} of a token's surprisal; {dtype} explains {allowed:.0e}): "
            "they do not compute the same model; look for a config field that one of them ignores, "
            f"or server_args that change the model; see {log}"
        )
    return noise


def check_finite(version: str, scores: ProbeScores, remedy: str) -> None:
    """Raise TrainerError when the trainer itself computes anything that is not finite: such a step
    is never served.
    """
    bad = int(np.count_nonzero(~np.isfinite(scores.logprobs_T)))
    if bad:
        raise TrainerError(
            f"{version} computes {bad} of {len(scores.logprobs_T)} log-probabilities that are not finite, and is not served: {remedy}"
        )


def power(before: ProbeScores, after: ProbeScores, noise: Noise) -> float:
    """The distance that a step moved the policy on the probe, in units of the noise. Below 1, its
    behaviour can't be distinguished from that of the step before.
    """
    return Noise.between(before.logprobs_T, after.logprobs_T).scaled / max(noise.scaled, 1e-9)


def compare(
    version: str, served: ProbeScores, trained: ProbeScores, noise: Noise, dtype: str, log: Path
) -> dict[str, float]:
    """Hold what the server computes to what the trainer does, and return metrics.

    probe, probe_p99: mean and 99th percentile of |difference| in nats.
    probe_noise: the mean noise on the base weights, in nats.
    probe_ratio: the scaled mean in units of the noise's; up to `MULTIPLE` is right.
    top1_overlap, top20_overlap: shares of the trainer's most likely tokens that are also the server's.

    Raises MismatchError if the server does not compute what the trainer does.
    """
    counts = len(served.logprobs_T), len(trained.logprobs_T)
    if counts[0] != counts[1] or not counts[0]:
        raise MismatchError(f"{version}: the server scored {counts[0]} probe tokens, the trainer {counts[1]}")
    seen = Noise.between(served.logprobs_T, trained.logprobs_T)
    if dtype == "exact":
        what, judged, floor = "on average and at most", (seen.mean, seen.largest), (0.0, 0.0)
        allowed = _EXACT_MEAN, _EXACT_LARGEST
    else:
        what, judged, floor = (
            "of a token's surprisal on average and for 1 in 10",
            (seen.scaled, seen.scaled_p90),
            (noise.scaled, noise.scaled_p90),
        )
        allowed = tuple(max(tight, MULTIPLE * size) for tight, size in zip(_TIGHT[dtype], floor, strict=True))
    top1, top20 = (top_overlap(trained.top_TV, served.top_TV, count) for count in (1, TOP))
    if not (judged[0] <= allowed[0] and judged[1] <= allowed[1]):
        raise MismatchError(
            f"the server does not hold {version}: its log-probabilities of the probe differ from the trainer's by {seen.mean:.2e} "
            f"nats a token; {what} {judged[0]:.2e} and {judged[1]:.2e} (allowed {allowed[0]:.1e} and {allowed[1]:.1e}; "
            f"{floor[0]:.1e} and {floor[1]:.1e} on the base weights), its most likely tokens agree by {top1:.1%} "
            f"(of the {TOP} most likely {top20:.1%}); see {log}"
        )
    return {
        "probe": seen.mean,
        "probe_p99": seen.p99,
        "probe_noise": noise.mean,
        "probe_ratio": seen.scaled / max(noise.scaled, 1e-9),
        "top1_overlap": top1,
        "top20_overlap": top20,
    }
