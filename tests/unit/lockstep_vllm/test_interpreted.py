"""New blocks of the KV cache are cleared, and nothing beside them; states are moved for requests that need it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lockstep_vllm.patches.cpu_interpreted import after_the_pass, before_the_pass, zero_block_ids


class Listed(list):
    """A tensor as far as its numbers are read."""

    def tolist(self) -> list[int]:
        return list(self)


@given(
    blocks=st.integers(1, 6),
    segments=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=3),
    data=st.data(),
)
def test_blocks_are_cleared_in_every_segment(blocks: int, segments: list[tuple[int, int]], data) -> None:
    """segments: words of a page, and words between two pages that belong to something else."""
    cleared = data.draw(st.lists(st.integers(0, blocks - 1), unique=True))
    memory = [np.ones((blocks, page + gap), np.int32) for page, gap in segments]
    addresses = Listed(part.ctypes.data for part in memory)
    strides, sizes = Listed(page + gap for page, gap in segments), Listed(page for page, _ in segments)
    zero_block_ids(SimpleNamespace(_meta=(addresses, strides, sizes, 1, 1, len(segments))), cleared)
    for part, (page, _) in zip(memory, segments, strict=True):
        wanted = np.ones_like(part)
        wanted[cleared, :page] = 0
        assert (part == wanted).all()


def test_a_cache_without_segments_has_nothing_to_clear() -> None:
    zero_block_ids(SimpleNamespace(_meta=None), [0])


def kept(calls: list[list[int]]):
    """An original that notes the slots it is called with."""

    def original(_self, count, *arguments) -> None:
        assert count == len(arguments[-1])
        calls.append(arguments[-1].tolist())

    return original


def test_states_are_copied_for_requests_whose_block_changes() -> None:
    import torch

    calls: list[list[int]] = []
    state, source = torch.tensor([3, 1, 0, 5, 2]), torch.tensor([2, 1, -1, 4, 0])
    slots = torch.tensor([3, 1, -1, 2, 0, 4], dtype=torch.int32)
    before_the_pass(kept(calls))(SimpleNamespace(), 5, state, source, torch.zeros(5), slots)
    assert calls == [[3, 0]], "slot 1 stays, slot 2 is fresh, -1 is padding, and slot 4 is beyond the batch"


def test_states_are_kept_for_requests_that_filled_a_block() -> None:
    import torch

    calls: list[list[int]] = []
    computed, accepted = torch.tensor([16, 17, 15, 33, 40]), torch.tensor([1, 1, 1, 3, 8])
    slots = torch.tensor([0, 1, 2, 3, 4])
    after_the_pass(kept(calls))(SimpleNamespace(block_size=16), 5, accepted, torch.zeros(5), computed, slots)
    assert calls == [[0, 3]], "a block ends at 16; 32 is among 31 to 33; 32 is before 33 to 40"
