"""Every invariant of a PackedBatch, checked in one call, and its sequences as they went in.

A run leaves the check out: it takes 0.6 ms a sequence, several percent of a step.

Shape suffixes: R rows, S row length, M nodes, Q sequences, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lockstep.batching.pack import loss_fields
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.errors import DataError

_TYPES = {
    "tokens_RS": np.int32,
    "positions_RS": np.int32,
    "nodes_RS": np.int32,
    "previous_RS": np.int32,
    "loss_mask_RS": np.bool_,
    "logprobs_RS": np.float32,
    "advantages_RS": np.float32,
    "weights_RS": np.float32,
    "temperatures_RS": np.float32,
    "node_row_M": np.int32,
    "node_start_M": np.int32,
    "node_stop_M": np.int32,
    "node_parent_M": np.int32,
    "leaf_Q": np.int32,
    "scored_offsets_Q": np.int64,
    "scored_index_P": np.int32,
    "sequence_weight_Q": np.float32,
    "sequence_advantage_Q": np.float32,
}


def _require(holds: bool | np.ndarray | np.bool_, what: str) -> None:
    if not np.all(holds):
        raise DataError(f"packed batch is inconsistent: {what}")


def validate(batch: PackedBatch, *, training: bool = True, experts: int | None = None) -> None:
    """Check every invariant of `batch`; raises DataError naming the first that fails.

    training: scored tokens must have finite sampling logprobs (not so for a batch that is only
        scored).
    experts: how many experts a layer has, to range-check the routed experts.
    """
    checks: list[Callable[[PackedBatch], None]] = [
        _check_types,
        _check_nodes,
        _check_rows,
        _check_sequences,
        _check_loss,
    ]
    for check in checks:
        check(batch)
    if training:
        scored = batch.logprobs_RS[batch.loss_mask_RS]
        _require(np.isfinite(scored), "a scored token has no sampling logprob")
        _require(scored <= 0, "a sampling logprob is above 0")
    if batch.experts_RSLK is not None:
        _check_routed_experts(batch, experts)
    if batch.current_RS is not None:
        same = batch.current_RS.dtype == np.bool_ and batch.current_RS.shape == batch.tokens_RS.shape
        _require(same, f"current_RS is {batch.current_RS.dtype} {batch.current_RS.shape}")


def _check_types(batch: PackedBatch) -> None:
    for name, kind in _TYPES.items():
        value = getattr(batch, name)
        _require(value.dtype == kind, f"{name} is {value.dtype}, not {np.dtype(kind)}")
        suffix = name.rsplit("_", 1)[1]
        _require(value.ndim == len(suffix), f"{name} has {value.ndim} dimensions")
        if suffix == "RS":
            _require(
                value.shape == batch.tokens_RS.shape,
                f"{name} has shape {value.shape}, tokens_RS {batch.tokens_RS.shape}",
            )
        elif suffix == "M":
            _require(len(value) == len(batch.node_row_M), f"{name} and node_row_M differ in length")
    sequences = len(batch.sequence_ids)
    _require(sequences > 0, "it has no sequence")
    _require(
        len(batch.leaf_Q) == len(batch.sequence_weight_Q) == len(batch.sequence_advantage_Q) == sequences,
        "Q fields differ",
    )
    _require(
        len(batch.scored_offsets_Q) == sequences + 1,
        "scored_offsets_Q must have one entry more than there are sequences",
    )


def _check_nodes(batch: PackedBatch) -> None:
    row, start, stop, parent = batch.node_row_M, batch.node_start_M, batch.node_stop_M, batch.node_parent_M
    nodes = len(row)
    _require((row >= 0) & (row < batch.rows), "a node's row is out of range")
    _require((start >= 0) & (start < stop) & (stop <= batch.row_length), "a node's span is empty or leaves its row")
    _require((parent >= -1) & (parent < nodes), "a node's parent is out of range")
    child = parent >= 0
    _require(row[child] == row[parent[child]], "a node's parent lies in another row")
    _require(stop[parent[child]] <= start[child], "a node's parent does not lie before it")
    _require((batch.leaf_Q >= 0) & (batch.leaf_Q < nodes), "a sequence's leaf is out of range")
    used = np.zeros(nodes, dtype=bool)
    used[batch.leaf_Q] = True
    for node in np.argsort(-start, kind="stable"):  # children lie after their parents
        if used[node] and parent[node] >= 0:
            used[parent[node]] = True
    _require(used, "a node belongs to no sequence")


def _check_rows(batch: PackedBatch) -> None:
    """Node ids, positions and previous indices follow from the node table alone: rebuild and
    compare.
    """
    nodes_RS = np.full(batch.tokens_RS.shape, -1, dtype=np.int32)
    position_RS = np.zeros(batch.tokens_RS.shape, dtype=np.int32)
    previous_RS = np.full(batch.tokens_RS.shape, -1, dtype=np.int32)
    above_M = np.zeros(len(batch.node_row_M), dtype=np.int64)
    covered = 0
    for node in np.argsort(batch.node_start_M, kind="stable"):
        row, start, stop = int(batch.node_row_M[node]), int(batch.node_start_M[node]), int(batch.node_stop_M[node])
        parent = int(batch.node_parent_M[node])
        if parent >= 0:
            above_M[node] = above_M[parent] + batch.node_stop_M[parent] - batch.node_start_M[parent]
        nodes_RS[row, start:stop] = node
        position_RS[row, start:stop] = above_M[node] + np.arange(stop - start)
        previous_RS[row, start:stop] = np.arange(start - 1, stop - 1)
        previous_RS[row, start] = batch.node_stop_M[parent] - 1 if parent >= 0 else -1
        covered += stop - start
    _require((nodes_RS >= 0).sum() == covered, "two nodes overlap")
    _require(nodes_RS == batch.nodes_RS, "nodes_RS disagrees with the node table")
    _require(position_RS == batch.positions_RS, "positions_RS does not count along the ancestors")
    _require(previous_RS == batch.previous_RS, "previous_RS does not follow the ancestors")
    padding = nodes_RS < 0
    _require(batch.tokens_RS[padding] == 0, "padding has a token id other than 0")
    _require(batch.tokens_RS >= 0, "a token id is negative")
    _require(~batch.loss_mask_RS[padding], "padding carries loss")


def _check_sequences(batch: PackedBatch) -> None:
    offsets = batch.scored_offsets_Q
    _require(
        offsets[0] == 0 and offsets[-1] == len(batch.scored_index_P), "scored_offsets_Q does not span scored_index_P"
    )
    _require(np.diff(offsets) >= 0, "scored_offsets_Q is not ascending")
    for q, name in enumerate(batch.sequence_ids):
        index = batch.scored_index_P[offsets[q] : offsets[q + 1]]
        _require(np.diff(index) > 0, f"{name}: its scored tokens are not ascending")
        _require(np.isin(index, batch.path_index(q)), f"{name}: a scored token is not one of its own")


def _check_loss(batch: PackedBatch) -> None:
    mask = batch.loss_mask_RS
    weight_Q, advantage_Q = batch.sequence_weight_Q, batch.sequence_advantage_Q
    _require(np.isfinite(weight_Q) & (weight_Q > 0), "a sequence's weight is not a positive number")
    _require(np.isfinite(advantage_Q), "a sequence's advantage is not a number")
    weights_RS, advantages_RS, mask_RS = loss_fields(
        batch.tokens_RS.shape, batch.row_Q, batch.scored_offsets_Q, batch.scored_index_P, weight_Q, advantage_Q
    )
    _require(mask_RS == mask, "loss_mask_RS disagrees with the sequences' scored tokens")
    _require(np.isclose(weights_RS, batch.weights_RS, rtol=1e-5, atol=0), "weights_RS is not the sum over the owners")
    _require(
        np.isclose(advantages_RS, batch.advantages_RS, rtol=1e-5, atol=1e-6), "advantages_RS is not the owners' average"
    )
    _require(batch.previous_RS[mask] >= 0, "a scored token has nothing that predicts it")
    _require(np.isnan(batch.logprobs_RS[~mask]), "a token that was not sampled has a logprob")
    _require(batch.temperatures_RS[~mask] == 1, "a token that was not sampled has a temperature")
    _require(np.isfinite(batch.temperatures_RS) & (batch.temperatures_RS > 0), "a temperature is not positive")


def _check_routed_experts(batch: PackedBatch, experts: int | None) -> None:
    routed_experts = batch.experts_RSLK
    if routed_experts is None:
        return
    _require(
        routed_experts.dtype in (np.uint8, np.uint16), f"experts_RSLK is {routed_experts.dtype}, not uint8 or uint16"
    )
    _require(
        routed_experts.ndim == 4 and routed_experts.shape[:2] == batch.tokens_RS.shape,
        f"experts_RSLK has shape {routed_experts.shape}",
    )
    ordered = np.sort(routed_experts, axis=-1)
    _require(ordered[..., 1:] != ordered[..., :-1], "a token names the same expert twice in one layer")
    if experts is not None:
        _require(routed_experts < experts, f"a token names an expert beyond the model's {experts}")


def flatten(batch: PackedBatch) -> list[TokenSequence]:
    """The sequences of a batch as they went in (routed experts of tokens whose experts did not
    matter may differ).
    """
    row_Q = batch.row_Q
    sequences = []
    for q, name in enumerate(batch.sequence_ids):
        index, row = batch.path_index(q), row_Q[q]
        mask_S = np.isin(index, batch.scored_index_P[batch.scored_offsets_Q[q] : batch.scored_offsets_Q[q + 1]])
        sequences.append(
            TokenSequence(
                name=name,
                tokens_S=batch.tokens_RS[row, index],
                loss_mask_S=mask_S,
                logprobs_S=np.where(mask_S, batch.logprobs_RS[row, index], np.float32(np.nan)),
                temperatures_S=np.where(mask_S, batch.temperatures_RS[row, index], np.float32(1)),
                experts_SLK=None if batch.experts_RSLK is None else batch.experts_RSLK[row, index],
                routed_S=None if batch.experts_RSLK is None else np.ones(len(index), dtype=bool),
            )
        )
    return sequences
