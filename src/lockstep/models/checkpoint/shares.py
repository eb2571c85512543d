"""The distribution of the Hugging Face tensors over ranks: every part once, the work spread over
the ranks that hold the part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep.errors import WeightsError
from lockstep.models.checkpoint.load import placed
from lockstep.models.contract import Piece, Shard

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Share:
    """A parameter that a rank supplies: its pieces, each with the row of the parameter
    (`flat_rows`) it starts at.
    """

    shard: Shard
    pieces: tuple[tuple[Piece, int], ...]


def share_out(ranks: Sequence[Sequence[Shard]], shapes: Mapping[str, tuple[int, ...]]) -> list[list[Share]]:
    """Each rank's shares, in model order. Every process computes the same shares without talking to
    the others. A parameter that several ranks hold (replicas, norms) goes to the rank with the
    fewest bytes so far.

    ranks: every rank's shards, in rank order.
    shapes: full shapes of the Hugging Face tensors (`expected_tensors`).

    Raises WeightsError when a part is on no rank.
    """
    holders: dict[tuple[Piece, ...], list[tuple[int, Shard]]] = {}
    for rank, shards in enumerate(ranks):
        for shard in shards:
            holders.setdefault(shard.pieces, []).append((rank, shard))
    loads, taken = [0] * len(ranks), set[Piece]()
    shares: list[list[Share]] = [[] for _ in ranks]
    for copies in holders.values():
        rank, shard = min(copies, key=lambda copy: (loads[copy[0]], copy[0]))
        pieces = tuple((piece, row) for piece, row in placed(shard) if piece.name is not None and piece not in taken)
        if pieces:
            taken.update(piece for piece, _ in pieces)
            loads[rank] += sum(_elements(piece, shapes) for piece, _ in pieces)
            shares[rank].append(Share(shard, pieces))
    _check_whole(taken, shapes)
    return shares


def box(piece: Piece, shape: tuple[int, ...]) -> Box:
    """A piece as a range for every dimension of its tensor."""
    ranges: list[tuple[int, int]] = [] if piece.index is None else [(piece.index, piece.index + 1)]
    ranges.append((piece.start, piece.stop))
    if piece.col_start is not None and piece.col_stop is not None:
        ranges.append((piece.col_start, piece.col_stop))
    return (*ranges, *((0, size) for size in shape[len(ranges) :]))


def _elements(piece: Piece, shapes: Mapping[str, tuple[int, ...]]) -> int:
    assert piece.name is not None
    return math.prod(high - low for low, high in box(piece, shapes[piece.name]))


def _check_whole(taken: set[Piece], shapes: Mapping[str, tuple[int, ...]]) -> None:
    covered: dict[str, int] = {}
    for piece in taken:
        assert piece.name is not None
        covered[piece.name] = covered.get(piece.name, 0) + _elements(piece, shapes)
    for name, shape in shapes.items():
        # A tied head is the embedding under a second name.
        if covered.get(name, 0) != math.prod(shape) and not (name == "lm_head.weight" and name not in covered):
            raise WeightsError(
                f"{name}: the ranks hold {covered.get(name, 0)} of {math.prod(shape)} elements; a rank is missing"
            )
