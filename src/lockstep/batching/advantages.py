"""Rewards of a group to advantages, in float64.

Shape suffix: G trajectories of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lockstep.errors import DataError

REWARD_EPS = 1e-5
"""Rewards that differ by at most this share of the largest one are equal. Summing the fp32 terms of
a reward in another order changes the reward by up to 8e-7 of its size (100 terms of one sign, 2,000
draws). Where terms cancel, the change is up to 1e-5 (20 terms, 99 of 100).
"""
LARGEST_REWARD = 1e30


def group_advantages(
    rewards_G: Sequence[float],
    normalization: Literal["std", "none"] = "std",
    name: str = "group",
    eps: float = REWARD_EPS,
) -> np.ndarray:
    """[G] float64: reward minus the group's mean, for "std" over the group's standard deviation (GRPO, arXiv
    2402.03300).

    Rewards that differ by at most `eps` of the largest |reward| are equal, and equal rewards give
    exactly zero. Nothing is rescaled over the batch, so noise in one group can't grow through
    another. Raises DataError, naming the group: a single trajectory (it has no baseline), a reward
    that is not finite or beyond 1e30.
    """
    reward_G = np.asarray(rewards_G, dtype=np.float64)
    if len(reward_G) < 2:
        raise DataError(
            f"{name} has {len(reward_G)} trajectory: a group needs at least 2, its mean reward is the baseline"
        )
    bad = ~(np.abs(reward_G) <= LARGEST_REWARD)
    if bad.any():
        raise DataError(f"{name}, trajectory {int(bad.argmax())}: reward {reward_G[bad][0]} is not a usable number")
    largest = np.abs(reward_G).max()
    if np.ptp(reward_G) <= eps * largest:
        return np.zeros_like(reward_G)
    scaled_G = reward_G / largest  # squares of tiny or huge rewards neither vanish nor overflow
    centred_G = scaled_G - scaled_G.mean()
    if normalization == "std":
        return centred_G / np.sqrt(np.mean(centred_G**2))
    return centred_G * largest
