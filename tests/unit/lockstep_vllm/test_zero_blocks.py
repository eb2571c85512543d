"""New blocks of the KV cache are cleared, and nothing beside them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lockstep_vllm.patches.cpu_zero_blocks import zero_block_ids


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
