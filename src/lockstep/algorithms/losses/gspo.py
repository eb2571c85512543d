"""GSPO (arXiv 2507.18071): PPO's surrogate with the sequence's ratio in place of the token's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.losses.base import PolicyLoss, mean_by_sequence
from lockstep.algorithms.losses.ppo import ppo_clip

if TYPE_CHECKING:
    from torch import Tensor


def gspo(
    new_P: Tensor, old_P: Tensor, advantage_Q: Tensor, sequence_P: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The ratio is `s = exp(mean over the sequence's tokens of log(new/old))`.

    A sequence's tokens are found through its pairs, so tokens it shares with siblings count as they
    do unpacked. Returns (loss per pair: its sequence's value, so that weighting works as for
    tokens; bool: the clip cut the gradient).
    """
    log_ratio_Q = mean_by_sequence(new_P - old_P, sequence_P, len(advantage_Q))
    loss_Q, clipped_Q = ppo_clip(log_ratio_Q, log_ratio_Q.new_zeros(log_ratio_Q.shape), advantage_Q, low, high)
    return loss_Q[sequence_P], clipped_Q[sequence_P]


LOSS = PolicyLoss(
    name="gspo",
    function=lambda pairs, clips: gspo(
        pairs.new_P, pairs.old_P, pairs.advantage_Q, pairs.sequence_P, clips.low, clips.high
    ),
    clip=(3e-4, 4e-4),
    old_logprobs="trainer",
    token_normalization="sequence",
    by_sequence=True,
)
