"""GMPO (arXiv 2507.20673): the geometric mean of a sequence's clipped token ratios, in place of the
arithmetic one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lockstep.algorithms.losses.base import PolicyLoss, mean_by_sequence

if TYPE_CHECKING:
    from torch import Tensor


def gmpo(
    new_P: Tensor, old_P: Tensor, advantage_Q: Tensor, sequence_P: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """`-exp(mean over the sequence's tokens of log r) A` with r = new/old, clipped per token before
    the mean: above `high` where A > 0, below `low` where A < 0.

    Returns (loss per pair: its sequence's value, so that weighting works as for tokens; bool: the
    clip cut the token's gradient).
    """
    log_ratio_P = new_P - old_P
    advantage_P = advantage_Q[sequence_P]
    least_P = log_ratio_P.clamp(min=math.log(low)) if low > 0 else log_ratio_P
    bound_P = log_ratio_P.clamp(max=math.log(high)).where(advantage_P > 0, least_P)
    ratio_Q = mean_by_sequence(bound_P, sequence_P, len(advantage_Q)).exp()
    return (-ratio_Q * advantage_Q)[sequence_P], (bound_P != log_ratio_P).detach()


LOSS = PolicyLoss(
    name="gmpo",
    function=lambda pairs, clips: gmpo(
        pairs.new_P, pairs.old_P, pairs.advantage_Q, pairs.sequence_P, clips.low, clips.high
    ),
    clip=(1 - math.exp(-0.4), math.exp(0.4) - 1),
    token_normalization="sequence",
    by_sequence=True,
)
