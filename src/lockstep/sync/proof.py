"""Does the server hold what was trained? Both sides score the same tokens, and the answers must agree."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.errors import MismatchError

FP32_TOLERANCE = 1e-5
"""Largest difference of one token's log-probability (nats) that two fp32 programs may show."""
BF16_TOLERANCE = 0.25
"""The same in bf16: rounding alone reaches some hundredths on single tokens; a missing update goes far beyond."""
BF16_MEAN_TOLERANCE = 0.02
"""Mean absolute difference in bf16 over a probe of some hundred tokens, dense models;

routing flips add to a mixture's.
"""


def check_probe(
    served: Sequence[float], trained: Sequence[float], version: str, *, largest: float, mean: float | None = None
) -> float:
    """Compares two sides' log-probabilities (nats) of one probe; returns the largest absolute difference.

    largest, mean: what single tokens and their mean may differ by. Raises MismatchError, which names the version and
    the token, when either is exceeded, a value is not a number, or the lengths differ.
    """
    if len(served) != len(trained) or not served:
        raise MismatchError(f"the probe of {version} has {len(served)} server and {len(trained)} trainer logprobs")
    differences = [abs(a - b) for a, b in zip(served, trained, strict=True)]
    worst = max(range(len(differences)), key=lambda i: _unless_nan(differences[i]))
    average = sum(differences) / len(differences)
    # Not `>`: a comparison with a NaN is false.
    if not differences[worst] <= largest or (mean is not None and not average <= mean):
        raise MismatchError(
            f"the server does not hold {version}: at token {worst + 1} of the probe it says {served[worst]:.6f} and the "
            f"trainer {trained[worst]:.6f} (largest difference allowed {largest:g}, mean {average:.2g}): "
            "sync again, or restart the server from the last published step"
        )
    return differences[worst]


def _unless_nan(value: float) -> float:
    return value if value == value else float("inf")
