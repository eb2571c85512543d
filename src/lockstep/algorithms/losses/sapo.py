"""SAPO (arXiv 2511.20347): a smooth gate on each token's ratio in place of a clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.algorithms.losses.base import PolicyLoss

if TYPE_CHECKING:
    from torch import Tensor


def sapo(
    new_P: Tensor, old_P: Tensor, advantage_P: Tensor, tau_positive: float, tau_negative: float
) -> tuple[Tensor, Tensor]:
    """`-(4 / tau) sigmoid(tau (r - 1)) A` with r = new/old, and tau by the sign of A.

    At r = 1 the gradient is the policy gradient. It fades on both sides, faster for a larger tau.
    Returns (loss per pair, bool: the gate has halved the gradient, or more).
    """
    ratio_P = (new_P - old_P).exp()
    tau_P = ratio_P.new_full(ratio_P.shape, tau_negative).masked_fill(advantage_P > 0, tau_positive)
    gate_P = (tau_P * (ratio_P - 1)).sigmoid()
    closed_P = 4 * gate_P * (1 - gate_P) < 0.5  # the gate's slope, 1 at r = 1
    return -4 / tau_P * gate_P * advantage_P, closed_P.detach()


LOSS = PolicyLoss(
    name="sapo",
    function=lambda pairs, clips: sapo(
        pairs.new_P,
        pairs.old_P,
        pairs.advantage_P,
        clips.parameters["tau_positive"],
        clips.parameters["tau_negative"],
    ),
    clip=None,
    parameters={"tau_positive": 1.0, "tau_negative": 1.05},
)
