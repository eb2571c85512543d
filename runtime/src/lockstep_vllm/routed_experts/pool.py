"""Routed experts of every token whose keys are in the KV cache, at the slot where its keys are.

Routed experts follow the blocks of the cache. A reused prefix brings its experts along, a copied
block takes them with it, and a freed block is overwritten. Nothing is kept per request. Beside each
row lies the computed token. So reading finds a row of another token, or one that was never written.

Shape suffixes: N slots of the cache, S tokens, L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Cache(NamedTuple):
    """The part of vLLM's KV cache whose positions are used: the layers with full attention keep
    every token.
    """

    group: int
    blocks: int
    block_size: int


@dataclass
class StepExperts:
    """The records of one step, from the worker to the scheduler."""

    rows: np.ndarray
    """[S, L, K] uint8 or uint16. (Named as vLLM names it: its Ray executor looks for it.)"""
    positions: np.ndarray
    """[2, S]: slot in the cache, token id."""
    cache: Cache


class RoutedExpertsPool:
    """Memory is touched only where something was written: tokens in the cache times L times K times
    the bytes of an expert's number.
    """

    def __init__(self, step: StepExperts) -> None:
        self.cache = step.cache
        slots = step.cache.blocks * step.cache.block_size
        self.rows_NLK = np.zeros((slots, *step.rows.shape[1:]), step.rows.dtype)
        self.tokens_N = np.full(slots, -1, np.int32)

    def put(self, step: StepExperts) -> None:
        slots, tokens = step.positions
        self.rows_NLK[slots] = step.rows
        self.tokens_N[slots] = tokens

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """(from, to): vLLM copies a block of the cache of which a request shares only the
        beginning.
        """
        sources, targets = np.array(pairs).T
        for array in (self.rows_NLK, self.tokens_N):
            blocks = array.reshape(self.cache.blocks, self.cache.block_size, *array.shape[1:])
            blocks[targets] = blocks[sources]

    def read(self, blocks: Sequence[int], start: int, token_ids: Sequence[int]) -> np.ndarray:
        """[S, L, K], a copy: the rows of these tokens, the first at position `start` of a request
        that has these blocks.

        It ends before the first token whose row is not there.
        """
        size = self.cache.block_size
        positions_S = np.arange(start, min(start + len(token_ids), len(blocks) * size))
        slots_S = np.asarray(blocks, np.int64)[positions_S // size] * size + positions_S % size
        wrong_S = self.tokens_N[slots_S] != np.asarray(token_ids[: len(slots_S)])
        there = int(wrong_S.argmax()) if wrong_S.any() else len(wrong_S)
        return self.rows_NLK[slots_S[:there]]
