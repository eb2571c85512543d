"""Rewards of a step to advantages, in float64. `lockstep.algorithms.advantages` has the estimators.

Shape suffixes: G trajectories of a group, T trajectories of all groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards
from lockstep.errors import DataError

REWARD_EPS = 1e-5
"""Rewards that differ by at most this share of the largest one are equal. Summing the fp32 terms of
a reward in another order changes the reward by up to 8e-7 of its size (100 terms of one sign, 2,000
draws). Where terms cancel, the change is up to 1e-5 (20 terms, 99 of 100).
"""
LARGEST_REWARD = 1e30


def equal_rewards(reward_G: np.ndarray, eps: float = REWARD_EPS) -> bool:
    """Whether the rewards differ by at most `eps` of the largest |reward|."""
    return bool(np.ptp(reward_G) <= eps * np.abs(reward_G).max())


def advantages(
    groups: Sequence[Sequence[float]],
    estimator: PolicyAdvantage,
    names: Sequence[str] | None = None,
    eps: float = REWARD_EPS,
) -> np.ndarray:
    """float64 `[T]`, group by group.

    names: of the groups, for errors; None: their numbers.
    eps: rewards that differ by at most this share of the largest |reward| are equal. Equal rewards
        give exactly zero (`PolicyAdvantage.baseline` says of what).

    Raises DataError, naming the group: a single trajectory where the group is the baseline; a
    reward that is not finite, beyond 1e30, or too small for the estimator; an estimator of the
    user's that does not give one finite number per trajectory.
    """
    names = names or [f"group {number}" for number in range(len(groups))]
    rewards = [
        _checked(np.asarray(group, dtype=np.float64), estimator, name)
        for group, name in zip(groups, names, strict=True)
    ]
    if estimator.scope == "group":
        return np.concatenate([_estimated([one_G], estimator, eps) for one_G in rewards])
    return _estimated(rewards, estimator, eps)


def _checked(reward_G: np.ndarray, estimator: PolicyAdvantage, name: str) -> np.ndarray:
    if len(reward_G) < 2 and estimator.baseline == "group":
        raise DataError(
            f"{name} has {len(reward_G)} trajectory: a group needs at least 2, its mean reward is the baseline"
        )
    bad = ~(np.abs(reward_G) <= LARGEST_REWARD)
    if bad.any():
        raise DataError(f"{name}, trajectory {int(bad.argmax())}: reward {reward_G[bad][0]} is not a usable number")
    if reward_G.min() < estimator.least_reward:
        raise DataError(
            f"{name}, trajectory {int(reward_G.argmin())}: reward {reward_G.min()} is below {estimator.least_reward:g}, "
            f"the least that advantage = {estimator.name} takes: choose another, or shift the rewards"
        )
    return reward_G


def _estimated(rewards: list[np.ndarray], estimator: PolicyAdvantage, eps: float) -> np.ndarray:
    """The estimator's result for these groups, with exact zeros where rewards are equal."""
    reward_T = np.concatenate(rewards)
    quiet_T = np.concatenate([np.full(len(one_G), equal_rewards(one_G, eps)) for one_G in rewards])
    if estimator.baseline == "batch":
        quiet_T = np.full(len(reward_T), equal_rewards(reward_T, eps))
    if quiet_T.all():
        return np.zeros_like(reward_T)
    largest = np.abs(reward_T).max()
    group_T = np.repeat(np.arange(len(rewards)), [len(one_G) for one_G in rewards])
    # Squares of tiny or huge rewards neither vanish nor overflow.
    scaled_T = np.asarray(estimator.function(Rewards(reward_T / largest, group_T)), dtype=np.float64)
    if scaled_T.shape != reward_T.shape or not np.isfinite(scaled_T).all():
        raise DataError(
            f"advantage = {estimator.name} gave {scaled_T.tolist()} for rewards {reward_T.tolist()}: expected a finite number each"
        )
    return np.where(quiet_T, 0.0, scaled_T if estimator.scale_free else scaled_T * largest)
