"""Dr. GRPO (arXiv 2503.20783): reward minus the group's mean. Division by the standard deviation
would weigh questions by their difficulty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards

if TYPE_CHECKING:
    import numpy as np


def dr_grpo(rewards: Rewards) -> np.ndarray:
    """`r - mean` of one group."""
    return rewards.reward_T - rewards.reward_T.mean()


ADVANTAGE = PolicyAdvantage("dr_grpo", dr_grpo)
