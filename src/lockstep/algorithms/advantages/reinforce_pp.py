"""REINFORCE++ (arXiv 2501.03262): rewards normalised over the whole batch, without groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards

if TYPE_CHECKING:
    import numpy as np


def reinforce_pp(rewards: Rewards) -> np.ndarray:
    """`(r - mean) / std` of all rewards of the step."""
    return (rewards.reward_T - rewards.reward_T.mean()) / rewards.reward_T.std()


ADVANTAGE = PolicyAdvantage("reinforce_pp", reinforce_pp, scope="batch", baseline="batch", scale_free=True)
