"""PackedBatch: what the tokens side hands to the engine, as plain numpy arrays in one safetensors
file.

A token that several sequences share is stored, and computed, once. The owner of a token's loss is
listed per sequence. `scored_offsets_Q` and `scored_index_P` give, for every sequence, the row
indices of its sampled tokens. So two sequences may share a token and still give it different
advantages and weights.

Shape suffixes: R rows, S row length, M nodes, Q sequences, P pairs (sequence, token that carries
its loss), N scored tokens of one row, L MoE layers, K experts per token, C most likely ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class PackedBatch:
    """Token rows of fixed length, each holding prefix trees whose nodes are contiguous runs of
    tokens.

    A query sees a key if the key comes no later in the row and lies in the query's node or an
    ancestor. A sequence lies in one row entirely: the tokens of its leaf's ancestors, root first,
    and those of the leaf.
    """

    tokens_RS: np.ndarray  # int32, padding 0
    positions_RS: np.ndarray  # int32, position in the token's own sequence (continues over ancestors)
    nodes_RS: np.ndarray  # int32, global node id, -1 padding
    # int32, row index of the token before it in its own sequence (may lie in the parent node), -1
    # at a sequence's first token and on padding
    previous_RS: np.ndarray
    loss_mask_RS: np.ndarray  # bool, True on tokens that carry loss (they were sampled)
    logprobs_RS: np.ndarray  # float32, sampling logprob of the token; NaN where not sampled
    advantages_RS: np.ndarray  # float32, weight-average over the sequences that own the token; 0 where no loss
    weights_RS: np.ndarray  # float32, summed over the sequences that own the token; 0 where no loss
    temperatures_RS: np.ndarray  # float32, sampling temperature the logprob refers to; 1 where not sampled
    node_row_M: np.ndarray  # int32, row of each node
    node_start_M: np.ndarray  # int32, first row index of each node
    node_stop_M: np.ndarray  # int32, one past its last row index
    # int32, global node id of the parent, -1 for a root; a parent lies earlier in the same row
    node_parent_M: np.ndarray
    leaf_Q: np.ndarray  # int32, node that ends each sequence
    scored_offsets_Q: np.ndarray  # int64 [Q + 1]: sequence q owns scored_index_P[offsets[q]:offsets[q + 1]]
    # int32, row index (in the sequence's row) of a token that carries the sequence's loss,
    # ascending
    scored_index_P: np.ndarray
    sequence_weight_Q: np.ndarray  # float32, weight of one trained token of that sequence
    sequence_advantage_Q: np.ndarray  # float32
    sequence_ids: tuple[str, ...]  # Q names for error messages: "group 0, trajectory 3"
    experts_RSLK: np.ndarray | None = None  # uint8/uint16 expert ids; None for dense models
    # bool, sampled by the very step that the batch trains, not by an earlier one; None: all sampled
    # tokens were
    current_RS: np.ndarray | None = None
    # int32, ids that the server held most likely in the place of each pair's token, best first, -1
    # where unknown; None: everywhere
    top_PC: np.ndarray | None = None
    # float64 [1], weight of the scored tokens that were left out because they add nothing to a
    # gradient; None: of none
    unpacked_weight: np.ndarray | None = None
    # float64 [1], what the sum of the batch's losses is divided by; None: the weight of its scored
    # tokens
    divisor: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return self.tokens_RS.shape[0]

    @property
    def row_length(self) -> int:
        return self.tokens_RS.shape[1]

    @property
    def row_Q(self) -> np.ndarray:
        """int32, the row each sequence lies in."""
        return self.node_row_M[self.leaf_Q]

    def path(self, sequence: int) -> list[int]:
        """Node ids of a sequence, root first."""
        nodes, node = [], int(self.leaf_Q[sequence])
        while node >= 0:
            nodes.append(node)
            node = int(self.node_parent_M[node])
        return nodes[::-1]

    def path_index(self, sequence: int) -> np.ndarray:
        """int64, row indices of a sequence's tokens in order."""
        return np.concatenate(
            [np.arange(self.node_start_M[node], self.node_stop_M[node]) for node in self.path(sequence)]
        )


@dataclass(frozen=True)
class ScoredRow:
    """The tokens of one row that carry loss, and who owns them. Q counts the row's sequences from
    0.
    """

    index_N: np.ndarray  # int64, row index, ascending
    predictor_N: np.ndarray  # int64, row index whose hidden state predicts the token
    target_N: np.ndarray  # int64, token id
    temperature_N: np.ndarray  # float32, the logits are divided by it
    sampling_N: np.ndarray  # float32, the server's logprob
    token_P: np.ndarray  # int64, index into N
    sequence_P: np.ndarray  # int64, index into Q
    advantage_Q: np.ndarray  # float32
    weight_Q: np.ndarray  # float32, weight of one scored token
    names_Q: tuple[str, ...]
    current_N: np.ndarray | None = None  # bool, sampled by the step that is trained; None: all
    position_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of the token in its sequence
    top_PC: np.ndarray | None = None  # int32, as in the batch


def _pairs_of(batch: PackedBatch, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index into P, position in `sequences`) of every pair that these sequences own."""
    starts, stops = batch.scored_offsets_Q[sequences], batch.scored_offsets_Q[sequences + 1]
    counts = stops - starts
    owner_P = np.repeat(np.arange(len(sequences)), counts)
    within_P = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + within_P, owner_P


def scored_row(batch: PackedBatch, row: int) -> ScoredRow:
    """The scored tokens of one row. All arrays are empty for a row of padding."""
    index_N = np.flatnonzero(batch.loss_mask_RS[row])
    position_S = np.cumsum(batch.loss_mask_RS[row]) - 1
    sequences = np.flatnonzero(batch.row_Q == row)
    pairs, sequence_P = _pairs_of(batch, sequences)
    return ScoredRow(
        index_N=index_N,
        predictor_N=batch.previous_RS[row, index_N].astype(np.int64),
        target_N=batch.tokens_RS[row, index_N].astype(np.int64),
        temperature_N=batch.temperatures_RS[row, index_N],
        sampling_N=batch.logprobs_RS[row, index_N],
        token_P=position_S[batch.scored_index_P[pairs]].astype(np.int64),
        sequence_P=sequence_P,
        advantage_Q=batch.sequence_advantage_Q[sequences],
        weight_Q=batch.sequence_weight_Q[sequences],
        names_Q=tuple(batch.sequence_ids[q] for q in sequences),
        current_N=None if batch.current_RS is None else batch.current_RS[row, index_N],
        position_N=batch.positions_RS[row, index_N].astype(np.int64),
        top_PC=None if batch.top_PC is None else batch.top_PC[pairs],
    )


def total_weight(batch: PackedBatch, rows: Iterable[int] | None = None) -> float:
    """Sum of the weights of all (sequence, scored token) pairs in `rows` (None: all), in float64.

    `loss_divisor` says what a loss sum is divided by.
    """
    counts_Q = np.diff(batch.scored_offsets_Q)
    weight_Q = batch.sequence_weight_Q.astype(np.float64) * counts_Q
    if rows is not None:
        weight_Q = weight_Q[np.isin(batch.row_Q, list(rows))]
    return float(weight_Q.sum())


def unpacked_weight(batch: PackedBatch) -> float:
    """Weight of the scored tokens of the batch that were left out of it. They count where a loss is
    normalised.
    """
    return 0.0 if batch.unpacked_weight is None else float(batch.unpacked_weight[0])


def loss_divisor(batch: PackedBatch, rows: Iterable[int] | None = None, minibatches: int = 1) -> float:
    """What the sum of the losses in `rows`, of one minibatch of as many, is divided by."""
    if batch.divisor is not None:
        return float(batch.divisor[0]) / minibatches
    return total_weight(batch, rows) + unpacked_weight(batch) / minibatches


def has_signal(batch: PackedBatch, rows: Iterable[int]) -> bool:
    """Whether a scored token in `rows` has an advantage. Without any, the policy loss has no
    gradient.
    """
    carries_Q = (np.diff(batch.scored_offsets_Q) > 0) & (batch.sequence_advantage_Q * batch.sequence_weight_Q != 0)
    return bool(carries_Q[np.isin(batch.row_Q, list(rows))].any())


def unpack_scores(batch: PackedBatch, values_RS: np.ndarray) -> list[np.ndarray]:
    """Per sequence, in the order they were packed, the values at its scored tokens."""
    row_Q = batch.row_Q
    return [
        values_RS[row_Q[q], batch.scored_index_P[batch.scored_offsets_Q[q] : batch.scored_offsets_Q[q + 1]]]
        for q in range(len(row_Q))
    ]
