"""Every limit of `lockstep validate` in one table, each with its reason.

A limit is loosened only by a measurement that shows the difference to be rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep.errors import ConfigError

Precision = Literal["float32", "bfloat16", "any"]
Device = Literal["cpu", "cuda", "any"]


@dataclass(frozen=True)
class Tolerance:
    """The limit of one figure, by its name in the reports. The first row that fits counts."""

    figure: str
    precision: Precision
    device: Device
    limit: float
    reason: str


_SUMS = "fp32 against fp32; sums are taken in another order"
_GRADIENTS = "fp32 sums over tokens; relative to the tensor's largest entry, or 0.1% of the model's largest"
_EXACT = "bytes are moved and not computed with"

_SIDES = "bf16 rounds at other places in two programs; routed experts are replayed"
_ANOTHER = "another family"
_PERCENT = {"llama3": 4.0, "qwen3": 4.0, "qwen3_5": 4.0, "qwen3_moe": 7.0, "qwen3_5_moe": 5.0, _ANOTHER: 4.0}
"""By family: the mean difference may be so much of the mean |log-probability|. A family without an
entry is held to the strictest.
"""

TOLERANCES = (
    Tolerance(
        "module outputs",
        "float32",
        "any",
        1e-5,
        "fp32's rounding, which layers add up; from the module's largest value",
    ),
    Tolerance("logits", "float32", "any", 2e-6, _SUMS + "; from the largest logit"),
    Tolerance("loss", "float32", "any", 1e-6, _SUMS),
    Tolerance("gradients", "float32", "any", 2e-5, _GRADIENTS),
    Tolerance("gradient norm", "float32", "any", 1e-5, "a sum of squares over all tensors"),
    Tolerance(
        "weights after a step", "float32", "any", 1e-6, "absolute; learning rate 0.01 times the gradients' rounding"
    ),
    Tolerance("packed log-probabilities", "float32", "any", 1e-5, "nats; the same tokens in rows of other lengths"),
    Tolerance("packed gradients", "float32", "any", 2e-5, _GRADIENTS),
    Tolerance("layout log-probabilities", "float32", "any", 1e-5, "nats; sums are split over ranks"),
    Tolerance("layout gradients", "float32", "any", 2e-5, _GRADIENTS),
    Tolerance(
        "layout update", "float32", "any", 1e-3, "share of the move; Adam turns rounding of tiny gradients into signs"
    ),
    Tolerance(
        "layout metrics", "float32", "any", 5e-3, "relative; of sums over all ranks, as in the engine's own tests"
    ),
    Tolerance("replayed log-probabilities", "float32", "any", 1e-5, "nats; fp32 sums in another order"),
    Tolerance("own choices", "float32", "any", 0.001, "share; two programs in fp32 choose alike but for ties"),
    Tolerance(
        "stale share", "any", "any", 0.5, "a step moves the policy beyond twice the noise, or it is another step"
    ),
    Tolerance("mismatch of a token", "float32", "any", 1e-4, "nats; two programs in fp32 agree on every token"),
    Tolerance("mismatch KL", "float32", "any", 1e-6, "nats a token; two programs in fp32"),
    Tolerance("mismatch KL", "bfloat16", "any", 1e-3, _SIDES),
    Tolerance("mismatch KL over the server's own", "float32", "any", 0.0, "fp32 has no noise that counts"),
    Tolerance(
        "mismatch KL over the server's own",
        "bfloat16",
        "any",
        4.0,
        "factor; SmolLM2's server, which scores again what it sampled, has 1.9e-3 from itself, more than 1e-3; "
        "two programs differ twice as far as two ways of one, and KL grows as the square of a difference",
    ),
    Tolerance("mismatch top-20 KL", "float32", "any", 1e-6, "nats a token; two programs in fp32"),
    Tolerance("mismatch top-20 KL", "bfloat16", "any", 2e-3, _SIDES),
    *(Tolerance(f"mismatch percent of {f}", "float32", "any", 0.01, "of the mean |log-probability|") for f in _PERCENT),
    *(Tolerance(f"mismatch percent of {f}", "bfloat16", "any", p, _SIDES) for f, p in _PERCENT.items()),
    Tolerance("bytes that differ", "any", "any", 0, _EXACT),
)
"""The engine's limits are those of its own tests against Hugging Face."""


def limit_of(figure: str, precision: str = "any", device: str = "any") -> float:
    """The limit of a figure. Raises ConfigError where the table has no row for it."""
    for row in TOLERANCES:
        if row.figure == figure and row.precision in ("any", precision) and row.device in ("any", device):
            return row.limit
    title, of, family = figure.rpartition(" of ")
    if title == "mismatch percent" and family != _ANOTHER:
        return limit_of(f"{title}{of}{_ANOTHER}", precision, device)
    raise ConfigError(f"validate/tolerances.py has no limit for {figure!r} in {precision} on {device}")
