"""MaxRL (arXiv 2602.02710): reward minus the group's mean, over the group's mean. With rewards 0
and 1 the gradient is that of the log of the success rate, up to the order of the group's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards

if TYPE_CHECKING:
    import numpy as np


def maxrl(rewards: Rewards) -> np.ndarray:
    """`(r - mean) / mean` of one group; rewards are never negative."""
    mean = rewards.reward_T.mean()
    return (rewards.reward_T - mean) / mean


ADVANTAGE = PolicyAdvantage("maxrl", maxrl, scale_free=True, least_reward=0.0)
