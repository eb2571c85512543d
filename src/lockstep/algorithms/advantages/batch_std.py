"""Batch-level scaling (arXiv 2508.08221): the group's mean as the baseline, the batch's standard
deviation as the scale, so that no group is weighed by its difficulty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards

if TYPE_CHECKING:
    import numpy as np


def batch_std(rewards: Rewards) -> np.ndarray:
    """`(r - group's mean) / std of all rewards of the step`."""
    return (rewards.reward_T - rewards.group_mean_T()) / rewards.reward_T.std()


ADVANTAGE = PolicyAdvantage("batch_std", batch_std, scope="batch", scale_free=True)
