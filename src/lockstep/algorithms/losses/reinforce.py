"""REINFORCE (Williams 1992): the advantage times the log-probability, without any ratio. For rollouts
of the very policy that is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.losses.base import PolicyLoss

if TYPE_CHECKING:
    from torch import Tensor


def reinforce(new_P: Tensor, advantage_P: Tensor) -> tuple[Tensor, Tensor]:
    """`-A log new`: (loss per pair, bool: False, nothing is clipped). With A = 1 that is the cross
    entropy of supervised training.
    """
    return -advantage_P * new_P, new_P.new_zeros(new_P.shape).bool()


LOSS = PolicyLoss(
    name="reinforce",
    function=lambda pairs, clips: reinforce(pairs.new_P, pairs.advantage_P),
    clip=None,
)
