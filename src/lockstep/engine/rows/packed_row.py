"""One row of a PackedBatch in the engine: which tokens a token sees, and the order in which linear
attention carries its states from a node to the node's children.

The rule: a query sees a key if the key comes no later in the row and lies in the query's node or an
ancestor. Numbering the nodes depth first turns "is an ancestor" into two comparisons. Node a is an
ancestor of b (or b itself) exactly if `enter[a] <= enter[b] < leave[a]`. The dense mask,
FlexAttention's mask function and the block mask all come from the per-token `enter` and `leave`.
Only the dense mask needs anything of size S x S.

Padding tokens form a node of their own, so every query sees at least itself and no NaN can arise.

Shapes: S row length, M nodes of the row (local numbers, padding last), N nodes of a depth level, L
longest of them, T their tokens, B blocks, G segments (nodes cut at block borders). Routed experts:
L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lockstep.batching.packed_batch import PackedBatch
from lockstep.engine.rows.routed_experts import Replay, record_keys
from lockstep.errors import DataError

BLOCK = 128
"""Tokens per FlexAttention block, both ways."""


def padded_length(used: int, unit: int) -> int:
    """The least multiple of `unit` that holds `used` tokens, and at least two units: torch compiles
    length 1 apart.
    """
    return max(2, -(-used // unit)) * unit


@dataclass(frozen=True)
class Nodes:
    """A row's nodes in row order: contiguous runs of tokens that cover the row. `parent_M` is a
    local node number or -1.
    """

    start_M: np.ndarray
    stop_M: np.ndarray
    parent_M: np.ndarray

    @cached_property
    def depth_M(self) -> np.ndarray:
        depth_M = np.zeros(len(self.parent_M), np.int64)
        for node, parent in enumerate(self.parent_M):
            if parent >= node:
                raise DataError(f"node {node} of a packed row has parent {parent}, which does not lie before it")
            depth_M[node] = 0 if parent < 0 else depth_M[parent] + 1
        return depth_M

    @cached_property
    def intervals_M(self) -> tuple[np.ndarray, np.ndarray]:
        """(enter, leave) of a depth-first numbering: a is b's ancestor or b itself iff enter[a] <=
        enter[b] < leave[a].
        """
        count = len(self.parent_M)
        size_M = np.ones(count, np.int64)
        for node in range(count - 1, -1, -1):
            if self.parent_M[node] >= 0:
                size_M[self.parent_M[node]] += size_M[node]
        enter_M, following = np.zeros(count, np.int64), np.zeros(count, np.int64)
        roots = 0
        for node, parent in enumerate(self.parent_M):
            if parent < 0:
                enter_M[node], roots = roots, roots + size_M[node]
            else:
                enter_M[node] = following[parent]
                following[parent] += size_M[node]
            following[node] = enter_M[node] + 1
        return enter_M, enter_M + size_M


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, laid side by side: `tokens_NL` row indices (padded with S),
    `lengths_N`, `parent_N` among all nodes.
    """

    nodes_N: Tensor
    parent_N: Tensor
    tokens_NL: Tensor
    lengths: tuple[int, ...]
    flat_T: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch. Tensors live on the engine's device."""

    tokens_S: Tensor
    positions_S: Tensor
    previous_S: Tensor
    enter_S: Tensor
    leave_S: Tensor
    nodes: Nodes
    index: int
    experts_SLK: Tensor | None = None
    replays: list[Replay] = field(default_factory=list, repr=False)
    """The records of the layers in the present pass over the row. The model adds them up and
    empties the list.
    """
    _cache: dict[str, object] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        return self.tokens_S.shape[0]

    def dense_mask_SS(self) -> Tensor:
        """bool `[S, S]`, True where query (row) sees key (column)."""
        if "dense" not in self._cache:
            order_S = torch.arange(self.length, device=self.enter_S.device)
            enter_S, leave_S = self.enter_S, self.leave_S
            seen = (order_S[:, None] >= order_S) & (enter_S <= enter_S[:, None]) & (enter_S[:, None] < leave_S)
            self._cache["dense"] = seen
        return self._cache["dense"]  # pyright: ignore[reportReturnType]

    def block_mask(self) -> object:
        """FlexAttention's BlockMask of the same rule, from counts per block: memory and time grow
        with blocks, not with S x S.
        """
        if "block" not in self._cache:
            self._cache["block"] = build_block_mask(self.nodes, self.enter_S, self.leave_S)
        return self._cache["block"]

    def levels(self) -> list[Level]:
        """Nodes grouped by depth, parents' levels first."""
        if "levels" not in self._cache:
            self._cache["levels"] = _levels(self.nodes, self.length, self.tokens_S.device)
        return self._cache["levels"]  # pyright: ignore[reportReturnType]

    def followed_S(self) -> Tensor:
        """bool, True on tokens that another one follows in some sequence: nothing depends on what
        the others compute.
        """
        if "followed" not in self._cache:
            followed = torch.zeros(self.length + 1, dtype=torch.bool, device=self.previous_S.device)
            followed[self.previous_S] = True  # -1, no token before, falls on the spare place at the end
            self._cache["followed"] = followed[:-1]
        return self._cache["followed"]  # pyright: ignore[reportReturnType]

    def record_keys_S(self) -> Tensor:
        """int64: what the routed experts of each token are accounted with."""
        if "keys" not in self._cache:
            self._cache["keys"] = record_keys(self.index, self.length, self.tokens_S.device)
        return self._cache["keys"]  # pyright: ignore[reportReturnType]

    def conv_taps_KS(self, taps: int) -> Tensor:
        """Row index of the token 0, 1, .. taps-1 places before each in its own sequence (S: before
        its beginning).
        """
        key = f"taps{taps}"
        if key not in self._cache:
            beyond = self.length
            step_S = torch.where(self.previous_S < 0, beyond, self.previous_S)
            step_S = torch.cat([step_S, step_S.new_full((1,), beyond)])
            rows = [torch.arange(self.length, device=step_S.device)]
            for _ in range(taps - 1):
                rows.append(step_S[rows[-1]])
            self._cache[key] = torch.stack(rows)
        return self._cache[key]  # pyright: ignore[reportReturnType]


def packed_row(batch: PackedBatch, index: int, device: torch.device, unit: int) -> PackedRow:
    """Row `index` of the batch, its unused tail cut off, padded to a multiple of `unit` tokens
    (shards of a row, blocks).
    """
    if index < 0:
        raise IndexError(f"row {index}")
    used_S = np.flatnonzero(batch.nodes_RS[index] >= 0)
    used = int(used_S[-1]) + 1 if len(used_S) else 0
    length = padded_length(used, unit)
    tokens_S, positions_S = np.zeros(length, np.int64), np.zeros(length, np.int64)
    previous_S = np.full(length, -1, np.int64)
    tokens_S[:used], positions_S[:used] = batch.tokens_RS[index, :used], batch.positions_RS[index, :used]
    previous_S[:used] = batch.previous_RS[index, :used]
    nodes = _nodes_of(batch, index, used, length)
    local_S = np.repeat(np.arange(len(nodes.start_M)), nodes.stop_M - nodes.start_M)
    if len(local_S) != length:
        raise DataError(f"row {index}: nodes cover {len(local_S)} of {length} tokens; they must tile the row")
    enter_M, leave_M = nodes.intervals_M

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return PackedRow(
        put(tokens_S),
        put(positions_S),
        put(previous_S),
        put(enter_M[local_S]),
        put(leave_M[local_S]),
        nodes,
        index,
        _routed_experts(batch, index, used, length, device),
    )


def padding_row(batch: PackedBatch, length: int, device: torch.device) -> PackedRow:
    """A row of padding alone, routed like any padding. It keeps a rank in step with ranks that have
    a row more.
    """
    zeros_S = torch.zeros(length, dtype=torch.long, device=device)
    nodes = Nodes(np.array([0]), np.array([length]), np.array([-1]))
    routed_experts = None
    if batch.experts_RSLK is not None:
        routed_experts = _padding_experts(batch.experts_RSLK, length, device)
    return PackedRow(zeros_S, zeros_S, zeros_S - 1, zeros_S, zeros_S + 1, nodes, -1, routed_experts)


def _routed_experts(batch: PackedBatch, index: int, used: int, length: int, device: torch.device) -> Tensor | None:
    """Replayed experts `[S, L, K]`; padding tokens go to the first K, so that every token has K
    different ones.

    uint8, or int32 for more experts. They are by far the largest part of a row, and all rows of a
    step are on the device.
    """
    if batch.experts_RSLK is None:
        return None
    used_SLK = batch.experts_RSLK[index, :used]
    if used_SLK.dtype == np.uint8:
        recorded_SLK = torch.from_numpy(used_SLK).to(device)
    else:  # as signed numbers: torch computes little with uint16
        recorded_SLK = torch.from_numpy(used_SLK.view(np.int16)).to(device).int() & 0xFFFF
    padding_SLK = _padding_experts(batch.experts_RSLK, length - used, device)
    return torch.cat([recorded_SLK, padding_SLK.to(recorded_SLK.dtype)])


def _padding_experts(experts_RSLK: np.ndarray, length: int, device: torch.device) -> Tensor:
    layers, topk = experts_RSLK.shape[2:]
    return torch.arange(topk, device=device).expand(length, layers, topk)


def _nodes_of(batch: PackedBatch, index: int, used: int, length: int) -> Nodes:
    members_M = np.flatnonzero(batch.node_row_M == index)
    members_M = members_M[np.argsort(batch.node_start_M[members_M], kind="stable")]
    local = {int(node): position for position, node in enumerate(members_M)}
    start = [int(v) for v in batch.node_start_M[members_M]]
    stop = [int(v) for v in batch.node_stop_M[members_M]]
    parent = []
    for node in members_M:
        above = int(batch.node_parent_M[node])
        if above >= 0 and above not in local:
            raise DataError(f"row {index}: node {int(node)} has parent {above} in another row")
        parent.append(local[above] if above >= 0 else -1)
    if length > used:
        start, stop, parent = [*start, used], [*stop, length], [*parent, -1]
    return Nodes(np.array(start, np.int64), np.array(stop, np.int64), np.array(parent, np.int64))


def _levels(nodes: Nodes, length: int, device: torch.device) -> list[Level]:
    levels = []
    for depth in range(int(nodes.depth_M.max()) + 1):
        members_N = np.flatnonzero(nodes.depth_M == depth)
        lengths_N = nodes.stop_M[members_N] - nodes.start_M[members_N]
        tokens_NL = nodes.start_M[members_N][:, None] + np.arange(lengths_N.max())
        inside_NL = np.arange(lengths_N.max()) < lengths_N[:, None]
        padded_NL = np.where(inside_NL, tokens_NL, length)
        offsets = np.concatenate([[0], np.cumsum(lengths_N)])
        put = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)  # noqa: E731
        levels.append(
            Level(
                put(members_N),
                put(nodes.parent_M[members_N]),
                put(padded_NL),
                tuple(int(n) for n in lengths_N),
                put(tokens_NL[inside_NL]),
                put(offsets),
            )
        )
    return levels


def block_counts_BB(nodes: Nodes, block: int = BLOCK) -> np.ndarray:
    """The number of visible (query, key) pairs of each block pair, ignoring row order inside the
    diagonal blocks.
    """
    length = int(nodes.stop_M[-1])
    blocks = -(-length // block)
    cuts = np.unique(np.concatenate([nodes.start_M, [length], np.arange(0, length, block)]))
    node_of_segment = np.searchsorted(nodes.start_M, cuts[:-1], side="right") - 1
    share_BG = np.zeros((blocks, len(cuts) - 1))
    share_BG[cuts[:-1] // block, np.arange(len(cuts) - 1)] = np.diff(cuts)
    enter_M, leave_M = nodes.intervals_M
    enter_G, leave_G = enter_M[node_of_segment], leave_M[node_of_segment]
    seen_GG = (enter_G[None, :] <= enter_G[:, None]) & (enter_G[:, None] < leave_G[None, :])
    return share_BG @ seen_GG @ share_BG.T


def build_block_mask(nodes: Nodes, enter_S: Tensor, leave_S: Tensor) -> object:
    """BlockMask `[1, 1, B, B]`. A block pair below the diagonal is full if all its pairs are
    visible, else partial if any is.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length, device = enter_S.shape[0], enter_S.device
    count_BB = block_counts_BB(nodes)
    blocks = len(count_BB)
    width_B = np.minimum(BLOCK, length - np.arange(blocks) * BLOCK)
    lower_BB = np.tril(np.ones((blocks, blocks), bool), -1)
    full_BB = lower_BB & (count_BB == width_B[:, None] * width_B[None, :])
    partial_BB = ((lower_BB & (count_BB > 0)) | np.eye(blocks, dtype=bool)) & ~full_BB

    def ordered(chosen_BB: np.ndarray) -> tuple[Tensor, Tensor]:
        indices_BB = np.argsort(~chosen_BB, axis=1, kind="stable").astype(np.int32)
        counts_B = chosen_BB.sum(1).astype(np.int32)
        return torch.from_numpy(counts_B).to(device)[None, None], torch.from_numpy(indices_BB).to(device)[None, None]

    def visible(_batch: Tensor, head_outputs: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (enter_S[key] <= enter_S[query]) & (enter_S[query] < leave_S[key])

    partial_count, partial_index = ordered(partial_BB)
    full_count, full_index = ordered(full_BB)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )
