"""The policy losses: one file each in this folder, and whatever a user names as "module:function".
Imports no torch.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import cast

from lockstep.errors import ConfigError
from lockstep.losses.base import LossFunction, PolicyLoss

_SHARED = ("__init__", "base")


@cache
def named_losses() -> dict[str, PolicyLoss]:
    """By name: the `LOSS` of each module in this folder."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _SHARED)
    losses = (importlib.import_module(f"{__name__}.{module}").LOSS for module in modules)
    return {loss.name: loss for loss in losses}


@cache
def find_loss(name: str) -> PolicyLoss:
    """The loss of this name, or of a user: "module:attribute", a `PolicyLoss` or a function of
    `LossInputs` and `Clips`.

    A function alone gets a `PolicyLoss`'s defaults: it is not clipped unless clip_low and clip_high
    are set. Raises ConfigError for a name that is unknown, or can't be imported.
    """
    if name in named_losses():
        return named_losses()[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"must be one of {', '.join(named_losses())} (GRPO's clipped ratio is that of ppo), or your own as module:function"
        )
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"can't be imported: {error}; its module must be on PYTHONPATH") from None
    if isinstance(value, PolicyLoss):
        return value
    if not callable(value):
        raise ConfigError(f"is a {type(value).__name__}: expected a PolicyLoss, or a function of LossInputs and Clips")
    return PolicyLoss(name, cast(LossFunction, value))
