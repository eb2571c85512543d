"""A prefix tree to rows of fixed length: best fit, deterministic for a seed.

A tree that fits is never cut. One that doesn't is cut between children, and each part gets its own copy of the tokens
above the cut.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.tokens.tree import Node


@dataclass(eq=False, slots=True)
class Part:
    """A copy of `node` with some of its descendants. `size` counts its tokens; `ends`: sequences that end at this
    copy's node.
    """

    node: Node
    size: int
    order: int  # the seed's rank of its first sequence, to break ties
    children: Sequence[Part] = ()
    ends: Sequence[int] = ()


def best_fit(parts: list[Part], capacity: int) -> list[list[Part]]:
    """Bins of at most `capacity` tokens, large parts first, each into the fullest bin that still takes it."""
    bins: list[list[Part]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for part in sorted(parts, key=lambda part: (-part.size, part.order)):
        place = bisect.bisect_left(room, (part.size, -1))
        if place == len(room):
            bins.append([part])
            bisect.insort(room, (capacity - part.size, len(bins) - 1))
        else:
            free, number = room.pop(place)
            bins[number].append(part)
            bisect.insort(room, (free - part.size, number))
    return bins


def sizes(root: Node) -> dict[int, int]:
    """Tokens in each subtree, keyed by id(node)."""
    total: dict[int, int] = {}
    for node in reversed(list(root.preorder())):
        total[id(node)] = node.size + sum([total[id(child)] for child in node.children])
    return total


def _join(node: Node, members: list[Part], ends: Sequence[int], order: int) -> Part:
    return Part(node, node.size + sum([part.size for part in members]), order, members, ends)


def partition(root: Node, row_length: int, order_Q: np.ndarray) -> list[list[Part]]:
    """Rows, each a list of trees with at most `row_length` tokens in all. No path from the root may be longer than
    that.

    `order_Q` ranks the sequences; only ties depend on it.
    """
    total, ranks = sizes(root), order_Q.tolist()
    parts: dict[int, list[Part]] = {}
    for node in reversed(list(root.preorder())):
        if not node.children and node is not root:  # it fits: no path is longer than a row
            parts[id(node)] = [Part(node, node.size, min([ranks[q] for q in node.ends]), (), node.ends)]
            continue
        below = [part for child in node.children for part in parts.pop(id(child))]
        order = min([*(ranks[q] for q in node.ends), *(part.order for part in below)])
        if node is not root and total[id(node)] <= row_length - node.above:
            parts[id(node)] = [_join(node, below, node.ends, order)]
        elif node is root:
            return best_fit(below, row_length)
        else:
            # The sequences that end here go with the first copy. A node without children can't be here: it fits by
            # assumption.
            bins = best_fit(below, row_length - node.above - node.size)
            parts[id(node)] = [
                _join(node, members, node.ends if i == 0 else [], min(part.order for part in members))
                for i, members in enumerate(bins)
            ]
    raise AssertionError("the root comes last in reversed preorder")
