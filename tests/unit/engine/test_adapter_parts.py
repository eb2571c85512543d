"""An adapter's matrix on its way to the server: as few parts as its rows allow."""

from __future__ import annotations

import itertools
import random

from lockstep.engine.export.adapters import _joined
from lockstep.models.contract import Piece


def test_rows_that_follow_each_other_are_one_piece():
    """Random cuts of random stretches of two tensors: the same rows in the same order, and no two pieces that could be one."""
    for _ in range(200):
        stretches, pieces = [], []
        for name in random.choices("ab", k=random.randint(1, 5)):
            start = random.randint(0, 50)
            stretches.append((name, start, start + random.randint(1, 40)))
            cuts = sorted({start, stretches[-1][2], *random.choices(range(start, stretches[-1][2]), k=3)})
            pieces += [Piece(name, low, high) for low, high in itertools.pairwise(cuts)]
        joined = _joined(pieces)
        assert _rows(joined) == _rows(pieces)
        assert all(first.name != two.name or first.stop != two.start for first, two in itertools.pairwise(joined))
        assert len(joined) <= len(stretches)
    columns = [Piece("a", 0, 4, 0, 8), Piece("a", 4, 8, 8, 16), Piece("a", 0, 4, index=1), Piece("a", 4, 8, index=2)]
    assert _joined(columns) == columns


def _rows(pieces):
    return [(piece.name, row) for piece in pieces for row in range(piece.start, piece.stop)]
