"""PPO's clipped surrogate per token (arXiv 1707.06347), with the dual clip of arXiv 1912.09729,
equation 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.losses.base import PolicyLoss

if TYPE_CHECKING:
    from torch import Tensor


def ppo_clip(
    new_P: Tensor, old_P: Tensor, advantage_P: Tensor, low: float, high: float, dual: float = float("inf")
) -> tuple[Tensor, Tensor]:
    """`-min(r A, clip(r, low, high) A)` with r = new/old; where A < 0 it ends at `-dual A`.

    Without the second clip, one token that the old policy all but excluded can outweigh a batch.
    Returns (loss per pair, bool: a clip cut the gradient).
    """
    ratio_P = (new_P - old_P).exp()
    free_P, bound_P = ratio_P * advantage_P, ratio_P.clamp(low, high) * advantage_P
    loss_P, clipped_P = -free_P.minimum(bound_P), bound_P < free_P
    if dual < float("inf"):
        most_P = -dual * advantage_P
        beyond_P = (advantage_P < 0) & (loss_P > most_P)
        loss_P, clipped_P = most_P.where(beyond_P, loss_P), clipped_P | beyond_P
    return loss_P, clipped_P.detach()


LOSS = PolicyLoss(
    name="ppo",
    function=lambda pairs, clips: ppo_clip(
        pairs.new_P, pairs.old_P, pairs.advantage_P, clips.low, clips.high, clips.dual
    ),
    clip=(0.2, 0.2),
    dual_clip=3.0,
)
