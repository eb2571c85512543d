"""The pool gives a row only where it is the row of the token that is asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lockstep_vllm.routed_experts.pool import Cache, RoutedExpertsPool, StepExperts

CACHE = Cache(group=0, blocks=5, block_size=3)
SLOTS = CACHE.blocks * CACHE.block_size
TOKENS = st.integers(0, 3)


def step(slots, tokens, value):
    rows = np.full((len(slots), 2, 2), value, np.uint16)
    return StepExperts(rows, np.array([slots, tokens], np.int64), CACHE)


@st.composite
def writes(draw):
    slots = draw(st.lists(st.integers(0, SLOTS - 1), unique=True, min_size=1, max_size=6))
    return slots, draw(st.lists(TOKENS, min_size=len(slots), max_size=len(slots)))


COPIES = st.tuples(st.integers(0, CACHE.blocks - 1), st.integers(0, CACHE.blocks - 1))
BLOCKS = st.lists(st.integers(0, CACHE.blocks - 1), min_size=0, max_size=3)


@given(st.lists(st.one_of(writes(), COPIES), max_size=8), BLOCKS, st.integers(0, 4), st.lists(TOKENS, max_size=5))
def test_what_was_written_last_up_to_the_first_that_is_missing(events, blocks, start, tokens):
    pool = RoutedExpertsPool(step([0], [0], 0))
    lying: dict[int, tuple[int, int]] = {}
    for value, (first, second) in enumerate(events):
        if isinstance(first, list):
            pool.put(step(first, second, value))
            lying |= {slot: (token, value) for slot, token in zip(first, second, strict=True)}
            continue
        pool.copy_blocks([(first, second)])
        for place in range(CACHE.block_size):
            source, target = first * CACHE.block_size + place, second * CACHE.block_size + place
            lying.pop(target, None) if source not in lying else lying.update({target: lying[source]})
    expected = []
    for position, token in enumerate(tokens, start):
        if position >= len(blocks) * CACHE.block_size:
            break
        slot = blocks[position // CACHE.block_size] * CACHE.block_size + position % CACHE.block_size
        if lying.get(slot, (None, 0))[0] != token:
            break
        expected.append([[lying[slot][1]] * 2] * 2)
    rows_SLK = pool.read(blocks, start, tokens)
    assert rows_SLK.dtype == np.uint16
    assert rows_SLK.tolist() == expected
    rows_SLK += 1  # a copy
    assert pool.read(blocks, start, tokens).tolist() == expected
