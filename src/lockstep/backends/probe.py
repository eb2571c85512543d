"""The proof after each sync: the server scores fixed tokens, and its log-probabilities must be the trainer's.

Shape suffixes: T tokens, V most likely ids in a token's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.errors import MismatchError
from lockstep.tokens.top import TOP
from lockstep.validate.mismatch import top_overlap

# Largest |difference| per token between two programs that compute the same policy, in nats. fp32: measured at 1e-6 to 3e-6 between
# vLLM and Megatron-Core on CPU; a wrong or missing adapter shows at 1e-2 and more. bf16: rounding alone gives a few 1e-2.
# "exact": fp64 on both sides; the served number's rounding to fp32, up to 32 nats.
_LARGEST = {"float32": 1e-4, "bfloat16": 0.25, "exact": 2e-6}
_MEAN = {"float32": 2e-5, "bfloat16": 0.06, "exact": 1e-6}


@dataclass(frozen=True)
class ProbeScores:
    """What one side computes in the place of each token after the first: its log-probability, and the TOP most likely ids."""

    logprobs: list[float]
    top_TV: np.ndarray  # integers, most likely first


@dataclass(frozen=True)
class Probe:
    """Fixed tokens, the same for a run's whole life. `dtype` is what both sides compute in, or "exact"."""

    tokens: tuple[int, ...]
    dtype: str

    @classmethod
    def make(cls, vocab_size: int, dtype: str, length: int = 48) -> Probe:
        """Tokens drawn with a fixed seed over the whole vocabulary."""
        tokens = np.random.default_rng(20_26).integers(0, vocab_size, length)
        return cls(tuple(int(token) for token in tokens), dtype)

    def compare(self, version: str, served: ProbeScores, trained: ProbeScores, log: Path) -> dict[str, float]:
        """Metrics: `probe`, the mean |difference| in nats; `top1_overlap` and `top20_overlap`, the shares of the trainer's most likely
        tokens that are also the server's.

        Raises MismatchError if the server does not compute what the trainer does.
        """
        counts = len(served.logprobs), len(trained.logprobs)
        if counts != (len(self.tokens) - 1,) * 2:
            raise MismatchError(f"{version}: the server scored {counts[0]} probe tokens, the trainer {counts[1]}")
        difference = np.abs(np.array(served.logprobs) - np.array(trained.logprobs))
        mean, largest = float(difference.mean()), float(difference.max())
        top1, top20 = (top_overlap(trained.top_TV, served.top_TV, count) for count in (1, TOP))
        if not (largest <= _LARGEST[self.dtype] and mean <= _MEAN[self.dtype]):
            raise MismatchError(
                f"the server does not hold {version}: its log-probabilities of the probe differ from the trainer's by "
                f"{mean:.2e} on average, {largest:.2e} at most (allowed {_MEAN[self.dtype]:.0e} and {_LARGEST[self.dtype]:.0e}), "
                f"its most likely tokens agree by {top1:.1%} (of the {TOP} most likely {top20:.1%}); see {log}"
            )
        return {"probe": mean, "top1_overlap": top1, "top20_overlap": top20}
