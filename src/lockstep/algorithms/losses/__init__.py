"""The policy losses: one file each in this folder, and whatever a user names as "module:function".
Imports no torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

from lockstep.algorithms.losses.base import LossFunction, PolicyLoss
from lockstep.algorithms.named import imported, named_in
from lockstep.errors import ConfigError


@cache
def named_losses() -> dict[str, PolicyLoss]:
    """By name: the `LOSS` of each module in this folder."""
    return named_in(__name__, Path(__file__).parent, lambda module: module.LOSS)


@cache
def find_loss(name: str) -> PolicyLoss:
    """The loss of this name, or of a user: "module:attribute", a `PolicyLoss` or a function of
    `LossInputs` and `Clips`.

    A function alone gets a `PolicyLoss`'s defaults: it is not clipped unless clip_low and clip_high
    are set. Raises ConfigError for a name that is unknown, or can't be imported.
    """
    if name in named_losses():
        return named_losses()[name]
    value = imported(name, f"{', '.join(named_losses())} (GRPO's clipped ratio is that of ppo)")
    if isinstance(value, PolicyLoss):
        return value
    if not callable(value):
        raise ConfigError(f"is a {type(value).__name__}: expected a PolicyLoss, or a function of LossInputs and Clips")
    return PolicyLoss(name, cast(LossFunction, value))
