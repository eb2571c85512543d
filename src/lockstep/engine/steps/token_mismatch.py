"""The token on which trainer and server disagree most, and whose it is.

Shape suffixes: N scored tokens of a row, P pairs (sequence, token that carries its loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lockstep.batching.packed_batch import ScoredRow

HALF_ULP = 2.0**-24
"""Largest relative error of a number that was rounded to fp32, as the server's log-probabilities
are.
"""


@dataclass(frozen=True)
class TokenMismatch:
    """A token on which trainer and server disagree, in nats.

    excess: the difference beyond the limit; negative within the limit.
    difference: |trainer's log-probability - server's|.
    logprob: the server's log-probability.
    """

    excess: float = float("-inf")
    difference: float = 0.0
    logprob: float = 0.0
    name: str = ""


def largest_mismatch(scored: ScoredRow, new_N: Tensor, limit: float) -> TokenMismatch:
    """The token that exceeds its limit most, among those that the trained step sampled.

    limit: nats that server and trainer may differ by. A token's limit is never below half a unit in
        the last place of the server's number, which is above 1e-6 from 16 nats on.
    """
    sampling_N = scored.sampling_N.astype(np.float64)
    difference_N = np.abs(new_N.double().cpu().numpy() - sampling_N)
    excess_N = difference_N - np.maximum(limit, np.abs(sampling_N) * HALF_ULP)
    if scored.current_N is not None:
        excess_N = np.where(scored.current_N, excess_N, -np.inf)
    if not len(excess_N):
        return TokenMismatch()
    token = int(excess_N.argmax())
    owner = int(scored.sequence_P[np.flatnonzero(scored.token_P == token)[0]])
    name = f"{scored.names_Q[owner]}, token {int(scored.position_N[token])}"
    return TokenMismatch(float(excess_N[token]), float(difference_N[token]), float(sampling_N[token]), name)
