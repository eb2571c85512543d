"""Rewards of a group to advantages, in float64.

Shape suffix: G trajectories of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lockstep.errors import DataError

NOISE = 1e-9
"""Rewards that differ by less than this share of the largest one are equal: summing the same terms in another order
must not train.
"""
_LARGEST = 1e30


def group_advantages(
    rewards_G: Sequence[float], normalization: Literal["std", "none"] = "std", name: str = "group"
) -> np.ndarray:
    """[G] float64: reward minus the group's mean, for "std" over the group's standard deviation (GRPO, arXiv
    2402.03300).

    Equal rewards give exactly zero. Nothing is rescaled over the batch, so noise in one group can't grow through
    another.
    Raises DataError, naming the group: a single trajectory (it has no baseline), a reward that is not finite or beyond
    1e30.
    """
    reward_G = np.asarray(rewards_G, dtype=np.float64)
    if len(reward_G) < 2:
        raise DataError(
            f"{name} has {len(reward_G)} trajectory: a group needs at least 2, its mean reward is the baseline"
        )
    bad = ~(np.abs(reward_G) <= _LARGEST)
    if bad.any():
        raise DataError(f"{name}, trajectory {int(bad.argmax())}: reward {reward_G[bad][0]} is not a usable number")
    largest = np.abs(reward_G).max()
    if np.ptp(reward_G) <= NOISE * largest:
        return np.zeros_like(reward_G)
    scaled_G = reward_G / largest  # squares of tiny or huge rewards neither vanish nor overflow
    centred_G = scaled_G - scaled_G.mean()
    if normalization == "std":
        return centred_G / np.sqrt(np.mean(centred_G**2))
    return centred_G * largest
