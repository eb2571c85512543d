"""RLOO (arXiv 2402.14740): reward minus the mean of the group's other trajectories."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards

if TYPE_CHECKING:
    import numpy as np


def rloo(rewards: Rewards) -> np.ndarray:
    """`r_i - mean of r_j, j != i`, which is `G / (G - 1) (r_i - mean)` of a group of G."""
    size = len(rewards.reward_T)
    return (rewards.reward_T - rewards.reward_T.mean()) * (size / (size - 1))


ADVANTAGE = PolicyAdvantage("rloo", rloo)
