"""The interface of an advantage estimator: a function from rewards to advantages, and what has to
be known to call the function safely.

Shape suffix: T trajectories, group by group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Rewards:
    """What an estimator is called with.

    reward_T: float64, at most 1 in size (`PolicyAdvantage.scale_free` says what becomes of the
        scale).
    group_T: int64, the group of each trajectory, counted from 0.
    """

    reward_T: np.ndarray
    group_T: np.ndarray

    def group_mean_T(self) -> np.ndarray:
        """float64: the mean reward of each trajectory's group."""
        import numpy as np

        return (np.bincount(self.group_T, weights=self.reward_T) / np.bincount(self.group_T))[self.group_T]


AdvantageFunction = Callable[[Rewards], "np.ndarray"]
"""float64 `[T]`: one advantage a trajectory."""


@dataclass(frozen=True)
class PolicyAdvantage:
    """An estimator and how it is called.

    scope: "group": one call per group; "batch": one call with all groups of a step.
    baseline: "group": a group whose rewards are equal gets exactly zero, and a group needs two
        trajectories; "batch": the same of the whole batch.
    scale_free: rewards of twice the size give the same advantages. Where False, the advantages grow
        with the rewards.
    least_reward: smallest reward that the estimator takes.
    """

    name: str
    function: AdvantageFunction
    scope: Literal["group", "batch"] = "group"
    baseline: Literal["group", "batch"] = "group"
    scale_free: bool = False
    least_reward: float = float("-inf")
