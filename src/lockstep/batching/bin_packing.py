"""A prefix tree to rows of fixed length: best fit, deterministic for a seed.

A tree that fits is never cut. One that doesn't is cut between children, and each part gets its own
copy of the tokens above the cut.

Shape suffixes: N nodes of the tree, Q sequences, P parts, I parts in the order they are laid out, C
their nodes, M those nodes when runs of only children are one.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from lockstep.batching.prefix_tree import Tree, spread

Copies = list[tuple[int, list[int]]]
"""Copies of cut nodes, each with some of the parts below. Sequences that end at a node end at the
first copy of it.
"""


def best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` tokens, as indices into `sizes`. These descend, and each goes into
    the fullest bin that still takes it.
    """
    bins: list[list[int]] = []
    amounts: list[int] = []  # of free tokens in some bin, ascending
    holders: dict[int, list[int]] = {}  # heaps of the bins with so many free tokens
    index = 0
    for size, count in Counter(sizes).items():
        stop = index + count
        while index < stop:
            position = bisect.bisect_left(amounts, size)
            if position == len(amounts):
                free, number = capacity, len(bins)
                bins.append([])
            else:
                free = amounts[position]
                number = heapq.heappop(holders[free])
                if not holders[free]:
                    del holders[free], amounts[position]
            taken = min(stop - index, free // size)  # after the first this bin is the fullest that takes the next
            bins[number].extend(range(index, index + taken))
            index += taken
            free -= taken * size
            if free and free not in holders:
                bisect.insort(amounts, free)
                holders[free] = []
            if free:
                heapq.heappush(holders[free], number)
    return bins


def partition_into(tree: Tree, row_length: int, order_Q: np.ndarray, wanted: int) -> tuple[list[list[int]], Copies]:
    """As `partition`, with trees cut further, as little as needed, until there are `wanted` rows or
    nothing is left to cut.
    """
    rows, copies = partition(tree, row_length, order_Q)
    limit = min(row_length, -(-int(tree.size_N.sum()) // wanted))
    while len(rows) < wanted and limit:
        rows, copies = partition(tree, limit, order_Q)
        limit = limit * 4 // 5
    return rows, copies


def partition(tree: Tree, row_length: int, order_Q: np.ndarray) -> tuple[list[list[int]], Copies]:
    """Rows of at most `row_length` tokens, as lists of parts, and copies. Part n is node n with all
    below it, or, if there are only N nodes, `copies[n - N]`. A path from the root that is longer
    than `row_length` gets a row of its own.

    `order_Q` ranks the sequences; only ties depend on it.
    """
    nodes = len(tree.start_N)
    total_N, rank_N = _below(tree, order_Q)
    cut_N = (total_N > row_length - tree.above_N) & (tree.count_N > 1)  # a leaf can't be cut
    kept = np.flatnonzero(~cut_N & ((tree.parent_N < 0) | cut_N[tree.parent_N]))
    key_N = rank_N - total_N * len(order_Q)  # large ones first, then by rank
    kept = kept[np.argsort(key_N[kept])]
    roots = tree.parent_N[kept] < 0
    below: defaultdict[int, list[int]] = defaultdict(list, {-1: kept[roots].tolist()})
    for node, parent in zip(kept[~roots].tolist(), tree.parent_N[kept[~roots]].tolist(), strict=True):
        below[parent].append(node)
    sizes, keys = total_N.tolist(), key_N.tolist()
    copies: Copies = []

    def fill(parts: list[int], capacity: int) -> list[list[int]]:
        parts.sort(key=keys.__getitem__)
        alone = [[part] for part in parts if sizes[part] > capacity]
        rest = parts[len(alone) :]  # sizes descend
        return alone + [[rest[i] for i in members] for members in best_fit([sizes[part] for part in rest], capacity)]

    for node in np.flatnonzero(cut_N)[::-1].tolist():
        own = int(tree.size_N[node])
        for parts in fill(below.pop(node), row_length - int(tree.above_N[node]) - own):
            below[int(tree.parent_N[node])].append(nodes + len(copies))
            copies.append((node, parts))
            sizes.append(own + sum([sizes[part] for part in parts]))
            keys.append(min([keys[part] % len(order_Q) for part in parts]) - sizes[-1] * len(order_Q))
    return fill(below[-1], row_length), copies


def computed_tokens(tree: Tree, copies: Copies) -> int:
    """Tokens of all rows of a partition: the tree's, and once more for every further copy of a
    node.
    """
    copied = np.array([node for node, _ in copies], dtype=np.int64)
    return int(tree.size_N.sum() + tree.size_N[copied].sum() - tree.size_N[np.unique(copied)].sum())


def _below(tree: Tree, order_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens in each subtree, least rank of a sequence that ends there)."""
    node_N = np.arange(len(tree.start_N))
    before_N = np.concatenate([[0], np.cumsum(tree.size_N)])
    rank_N = np.full(len(node_N) + 1, len(order_Q))
    np.minimum.at(rank_N, tree.end_Q, order_Q)
    ranges = np.stack([node_N, node_N + tree.count_N], axis=1).ravel()
    return before_N[node_N + tree.count_N] - before_N[node_N], np.minimum.reduceat(rank_N, ranges)[::2]


@dataclass(frozen=True)
class Layout:
    """The positions of all nodes in the rows. `source` are positions of the flat arrays, in the
    order of rows; the other fields are as in PackedBatch.
    """

    source: np.ndarray
    row_M: np.ndarray
    start_M: np.ndarray
    stop_M: np.ndarray
    above_M: np.ndarray
    parent_M: np.ndarray
    leaf_Q: np.ndarray


def lay_out(tree: Tree, rows: list[list[int]], copies: Copies) -> Layout:
    """Rows of parts as nodes one after the other, parents first."""
    nodes = len(tree.start_N)
    parts: list[int] = []
    ends: list[int] = []
    for trees in rows:
        stack = trees[::-1]
        while stack:
            parts.append(part := stack.pop())
            if part >= nodes:
                stack += copies[part - nodes][1][::-1]
        ends.append(len(parts))
    copied = np.array([node for node, _ in copies], dtype=np.int64)
    node_P = np.concatenate([np.arange(nodes), copied])
    count_P = np.concatenate([tree.count_N, np.ones_like(copied)])
    leads_P = np.concatenate([np.ones(nodes, dtype=bool), np.diff(copied, prepend=-1) != 0])
    part_I = np.array(parts)
    above_P, item_P = np.full(len(node_P), -1), np.zeros_like(node_P)
    item_P[part_I] = np.arange(len(part_I))
    for copy, (_, below) in enumerate(copies, nodes):
        above_P[below] = item_P[copy]
    above_I = above_P[part_I]  # the copy that each hangs below, -1 for none
    count_I = count_P[part_I]
    first_I = np.cumsum(count_I) - count_I
    node_C = spread(node_P[part_I], count_I)
    parent_C = np.arange(len(node_C)) - node_C + tree.parent_N[node_C]
    parent_C[first_I] = np.where(above_I < 0, -1, first_I[above_I])
    leads = np.flatnonzero(np.repeat(leads_P[part_I], count_I))
    lead_N = np.zeros(nodes, dtype=np.int64)  # where a node's sequences end
    lead_N[node_C[leads]] = leads
    children_C = np.bincount(parent_C[parent_C >= 0], minlength=len(node_C))
    ends_C = np.bincount(lead_N[tree.end_Q], minlength=len(node_C))
    # Where nothing branches or ends there is one node and not two: the only child comes next in any
    # case.
    begins_C = np.concatenate([[True], (children_C != 1) | (ends_C > 0)])[:-1]
    head, number_C = np.flatnonzero(begins_C), np.cumsum(begins_C) - 1
    size_C = tree.size_N[node_C]
    size_M = np.add.reduceat(size_C, head)
    row_M = np.repeat(np.repeat(np.arange(len(rows)), np.diff(ends, prepend=0)), count_I)[head]
    start_M = np.cumsum(size_M) - size_M
    begin_R = np.searchsorted(row_M, np.arange(len(rows)))
    start_M -= np.append(start_M, 0)[begin_R][row_M]  # the last rows may be empty
    return Layout(
        source=spread(tree.start_N[node_C], size_C),
        row_M=row_M,
        start_M=start_M,
        stop_M=start_M + size_M,
        above_M=tree.above_N[node_C[head]],
        parent_M=np.where(parent_C[head] < 0, -1, number_C[parent_C[head]]),
        leaf_Q=number_C[lead_N[tree.end_Q]],
    )
