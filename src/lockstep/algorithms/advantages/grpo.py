"""GRPO (arXiv 2402.03300): reward minus the group's mean, over the group's standard deviation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards

if TYPE_CHECKING:
    import numpy as np


def grpo(rewards: Rewards) -> np.ndarray:
    """`(r - mean) / std` of one group, with the population's standard deviation."""
    return (rewards.reward_T - rewards.reward_T.mean()) / rewards.reward_T.std()


ADVANTAGE = PolicyAdvantage("grpo", grpo, scale_free=True)
