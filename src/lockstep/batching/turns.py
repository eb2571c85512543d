"""Advantages turn by turn: what each sampled reply earned, and its tokens as a training sequence of their own.

The sequences of a conversation's turns begin alike, so a packed batch computes what they share once.

Shape suffixes: K turns of a trajectory, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lockstep.batching.prefix_tree import TokenSequence
from lockstep.batching.tokenize import Tokenized


def returns_of(rewards_K: Sequence[float], discount: float) -> list[float]:
    """For each turn its own reward and those of later turns, each turn's distance discounted: `g_k = r_k + discount g_(k+1)`."""
    returns, later = [], 0.0
    for reward in reversed(rewards_K):
        later = reward + discount * later
        returns.append(later)
    return returns[::-1]


def by_turn(rollout: Tokenized) -> Tokenized:
    """The same rollout with one sequence a turn, which ends with the turn and carries loss on the turn alone."""
    sequences = [
        _one_turn(rollout.sequences[turn.sequence], turn.number, turn.start, turn.stop) for turn in rollout.turns
    ]
    return replace(rollout, sequences=sequences)


def _one_turn(sequence: TokenSequence, number: int, start: int, stop: int) -> TokenSequence:
    cut = sequence.cut(stop)
    before_S = np.arange(stop) < start
    name = f"group {sequence.group}, trajectory {sequence.trajectory}, turn {number}"
    routed_S = None
    if cut.routed_S is not None:
        routed_S = cut.routed_S.copy()
        routed_S[-1] = False  # nothing follows the last token that its experts could matter to
    return replace(
        cut,
        name=name,
        turn=number,
        loss_mask_S=cut.loss_mask_S & ~before_S,
        logprobs_S=np.where(before_S, np.float32(np.nan), cut.logprobs_S),
        temperatures_S=np.where(before_S, np.float32(1), cut.temperatures_S),
        steps_S=None if cut.steps_S is None else np.where(before_S, np.int32(-1), cut.steps_S),
        routed_S=routed_S,
    )
