"""A user's policy loss tried on random pairs, before a step is trained with it."""

from __future__ import annotations

from functools import cache

import torch

from lockstep.algorithms.losses.base import Clips, LossInputs, PolicyLoss
from lockstep.errors import ConfigError

_PAIRS, _SEQUENCES = 24, 4


@cache
def check_loss(loss: PolicyLoss) -> None:
    """Raise ConfigError unless the loss gives a finite value for each pair, and every advantage
    other than 0 a gradient.

    The ratio is 1 in this trial, as in the first update of a step. So no clip cuts a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    logprob_P = -torch.rand(_PAIRS, generator=generator, dtype=torch.float64) - 0.1
    new_P = logprob_P.clone().requires_grad_()
    sequence_P = torch.arange(_PAIRS) % _SEQUENCES
    advantage_Q = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)
    low, high = loss.clip or (1.0, float("inf"))
    clips = Clips(1 - low, 1 + high, loss.dual_clip or float("inf"), loss.parameters)
    try:
        loss_P, clipped_P = loss.function(LossInputs(new_P, logprob_P, sequence_P, advantage_Q), clips)
    except Exception as error:
        raise ConfigError(
            f"loss = {loss.name}: {type(error).__name__} on a trial of {_PAIRS} pairs: {error}"
        ) from error
    for what, value_P in (("loss", loss_P), ("clipped", clipped_P)):
        if not isinstance(value_P, torch.Tensor) or value_P.shape != new_P.shape:
            shape = list(value_P.shape) if isinstance(value_P, torch.Tensor) else type(value_P).__name__
            raise ConfigError(f"loss = {loss.name}: {what} is {shape}, expected one value for each pair, [{_PAIRS}]")
    if not loss_P.requires_grad:
        raise ConfigError(f"loss = {loss.name} has no gradient: compute it from `new_P` without detaching all of it")
    [gradient_P] = torch.autograd.grad(loss_P.sum(), new_P)
    if not (loss_P.isfinite().all() and gradient_P.isfinite().all()):
        raise ConfigError(f"loss = {loss.name}: value or gradient is not finite at a ratio of 1")
    if not gradient_P.abs().gt(0).all():
        raise ConfigError(f"loss = {loss.name} gives some pairs no gradient at a ratio of 1, whatever their advantage")
