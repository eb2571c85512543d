"""The advantage estimators: one file each in this folder, and a user's own as "module:function".
numpy is imported when an estimator is called, not before.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

from lockstep.algorithms.advantages.base import AdvantageFunction, PolicyAdvantage
from lockstep.algorithms.named import imported, named_in
from lockstep.errors import ConfigError


@cache
def named_advantages() -> dict[str, PolicyAdvantage]:
    """By name: the `ADVANTAGE` of each module in this folder."""
    return named_in(__name__, Path(__file__).parent, lambda module: module.ADVANTAGE)


@cache
def find_advantage(name: str) -> PolicyAdvantage:
    """The estimator of this name, or of a user: "module:attribute", a `PolicyAdvantage` or a
    function of `Rewards`.

    A function alone is called once per group, and its result grows with the rewards. Raises
    ConfigError for a name that is unknown, or can't be imported.
    """
    if name in named_advantages():
        return named_advantages()[name]
    value = imported(name, ", ".join(named_advantages()))
    if isinstance(value, PolicyAdvantage):
        return value
    if not callable(value):
        raise ConfigError(f"is a {type(value).__name__}: expected a PolicyAdvantage, or a function of Rewards")
    return PolicyAdvantage(name, cast(AdvantageFunction, value))
