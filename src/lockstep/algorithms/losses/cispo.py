"""CISPO (arXiv 2506.13585): every token keeps a gradient, with a bounded weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.losses.base import PolicyLoss

if TYPE_CHECKING:
    from torch import Tensor


def cispo(new_P: Tensor, old_P: Tensor, advantage_P: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """`-sg(clip(new/old, low, high)) * A * log new`: (loss per pair, bool: the weight was clipped)."""
    ratio_P = (new_P.detach() - old_P).exp()
    clipped_P = (ratio_P < low) | (ratio_P > high)
    return -ratio_P.clamp(low, high) * advantage_P * new_P, clipped_P


LOSS = PolicyLoss(
    name="cispo",
    function=lambda pairs, clips: cispo(pairs.new_P, pairs.old_P, pairs.advantage_P, clips.low, clips.high),
    clip=(1.0, 4.0),
)
