"""REINFORCE++-baseline (arXiv 2501.03262, version 4): the group's mean as the baseline, then
normalised over the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.advantages.base import PolicyAdvantage, Rewards

if TYPE_CHECKING:
    import numpy as np


def reinforce_pp_baseline(rewards: Rewards) -> np.ndarray:
    """`(r - group's mean) / std of these differences over the step`."""
    centred_T = rewards.reward_T - rewards.group_mean_T()
    return centred_T / centred_T.std()


ADVANTAGE = PolicyAdvantage("reinforce_pp_baseline", reinforce_pp_baseline, scope="batch", scale_free=True)
