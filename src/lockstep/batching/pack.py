"""Pack token sequences into a PackedBatch, take it apart again, check it, and keep it in one
safetensors file.

Shape suffixes: R rows, S row length, M nodes, Q sequences, P pairs (sequence, token that carries
its loss), X tokens of all sequences end to end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from lockstep.batching.bin_packing import Layout, computed_tokens, lay_out, partition, partition_into
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.prefix_tree import Flat, TokenSequence, Tree, build, end_to_end, spread
from lockstep.errors import DataError
from lockstep.process.durable import replacing

SCHEMA = "lockstep.packed/2"
AUTO_ROW_LENGTH = 4096
"""Rows grow to this many tokens before a second one is opened, when the caller leaves the length
open.
"""
MOST_ROW_LENGTH = 32768
"""Rows grow to this many tokens, where memory carries them, before what sequences share is computed
again.
"""
_REPEATED = 1.02
"""Rows grow until at most so many times the unique tokens are computed."""
_MULTIPLE = 64


@dataclass(frozen=True)
class Fitted:
    """Sequences that fit a row. `truncated` and `dropped` name those that did not."""

    sequences: list[TokenSequence]
    truncated: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def fit(
    sequences: Sequence[TokenSequence], row_length: int | None, over_length: Literal["error", "truncate", "drop"]
) -> Fitted:
    """Apply the rule for sequences longer than a row. A sequence that is cut before its first
    scored token is dropped.

    Raises DataError naming the first long sequence (over_length "error"), or if nothing is left.
    """
    kept: list[TokenSequence] = []
    truncated, dropped = [], []
    for sequence in sequences:
        if row_length is None or len(sequence) <= row_length:
            kept.append(sequence)
            continue
        if over_length == "error":
            raise DataError(
                f"{sequence.name} has {len(sequence)} tokens, a row holds {row_length}: raise row_length, "
                "or set over_length to truncate or drop",
                unusable="too_long",
            )
        cut = sequence.cut(row_length)
        if over_length == "truncate" and cut.scored:
            kept.append(cut)
            truncated.append(sequence.name)
        else:
            dropped.append(sequence.name)
    if not kept:
        reason = f": all {len(dropped)} sequences are longer than row_length = {row_length}" if dropped else ""
        raise DataError(f"the batch is empty{reason}")
    return Fitted(kept, tuple(truncated), tuple(dropped))


def pack(
    sequences: Sequence[TokenSequence],
    advantages_Q: np.ndarray,
    weights_Q: np.ndarray,
    *,
    row_length: int | None = None,
    seed: int = 0,
    share_prefixes: bool = True,
    minibatches: int = 1,
    data: int = 1,
    multiple: int = _MULTIPLE,
    row_limit: int = MOST_ROW_LENGTH,
) -> PackedBatch:
    """Pack `sequences` with one advantage and one weight per scored token each; sequence order is
    kept in the Q fields.

    row_length: tokens per row. None: the longest sequence, or up to 4096 if there are that many
        tokens. Rows grow further, up to `row_limit`, where shorter rows would compute shared tokens
        more than once.
    `multiple`: the length is rounded up to it. The number of rows is a multiple of `minibatches` x
        `data`. Trees are cut further until there are so many rows. With too few sequences, rows of
        padding end each minibatch. Equal input and seed give equal bytes.

    Raises DataError: nothing to pack, a sequence longer than a row (see `fit`), an unfit sequence
    (see `end_to_end`), or fewer sequences than minibatches.
    """
    if not len(sequences):
        raise DataError("the batch is empty: there is no sequence to pack")
    if not len(sequences) == len(advantages_Q) == len(weights_Q):
        raise ValueError(f"{len(sequences)} sequences, {len(advantages_Q)} advantages, {len(weights_Q)} weights")
    random = np.random.default_rng(seed)
    order_Q = random.permutation(len(sequences))
    flat = end_to_end(sequences)
    mask_X = flat.sampled_X.copy()  # before sharers learn from each other
    tree = build(flat, share_prefixes)
    longest = int((flat.stop_Q - flat.start_Q).max())
    chosen = row_length is None
    if row_length is None:
        row_length = _grown(tree, order_Q, longest, minibatches * data, row_limit)
    elif longest > row_length:
        fit(sequences, row_length, "error")
    row_length = -(-row_length // multiple) * multiple
    rows, copies = partition_into(tree, row_length, order_Q, minibatches * data)
    if len(rows) < minibatches <= len(sequences):  # equal sequences end at one node
        tree = build(flat, share=False)
        rows, copies = partition_into(tree, row_length, order_Q, minibatches * data)
    if len(rows) < minibatches:
        raise DataError(
            f"the batch has {len(sequences)} sequences, too few for minibatches = {minibatches}: lower minibatches"
        )
    rows = [rows[i] for i in random.permutation(len(rows))]
    assigned = _distribute(rows, minibatches, data)
    layout = lay_out(tree, assigned, copies)
    if chosen:  # no longer than what fills the longest row
        row_length = -(-int(layout.stop_M.max()) // multiple) * multiple
    scored = _scored(layout, mask_X, flat.stop_Q)
    owned = (*scored, np.asarray(weights_Q, np.float32), np.asarray(advantages_Q, np.float32))
    return _batch(flat, layout, (len(assigned), row_length), owned, tuple([sequence.name for sequence in sequences]))


def _grown(tree: Tree, order_Q: np.ndarray, longest: int, rows: int, limit: int) -> int:
    """The row length for packing. It grows from that of short prompts by a quarter at a time, until
    hardly a token is computed twice.

    rows: as many are wanted, so that none may be longer than its share of the tokens.
    """
    unique = int(tree.size_N.sum())
    share = -(-unique // rows)
    length = max(longest, min(share, AUTO_ROW_LENGTH))
    most = max(length, min(share, limit))
    while length < most and computed_tokens(tree, partition(tree, length, order_Q)[1]) > _REPEATED * unique:
        length = min(length * 5 // 4, most)
    return length


def minibatch_rows(rows: int, minibatches: int, index: int) -> range:
    """The rows of optimizer step `index` of a batch with `rows` rows."""
    size = rows // minibatches
    return range(index * size, (index + 1) * size)


def _distribute(rows: list[list[int]], minibatches: int, data: int) -> list[list[int]]:
    """Rows distributed to minibatches round-robin, each filled up with empty rows to the same
    multiple of `data`.
    """
    size = -(-len(rows) // (minibatches * data)) * data
    assigned: list[list[int]] = []
    for index in range(minibatches):
        members = rows[index::minibatches]
        assigned += members + [[] for _ in range(size - len(members))]
    return assigned


def _scored(layout: Layout, mask_X: np.ndarray, stop_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets of each sequence's scored tokens, int64 [Q + 1]; row index of every one, sequence by
    sequence).
    """
    sequences: list[np.ndarray] = []
    nodes: list[np.ndarray] = []
    owner, node = np.arange(len(layout.leaf_Q)), layout.leaf_Q
    while len(node):  # one step up for all that are not at a root
        sequences.append(owner)
        nodes.append(node)
        owner, node = owner[layout.parent_M[node] >= 0], layout.parent_M[node]
        node = node[node >= 0]
    order = np.argsort(np.concatenate(sequences[::-1]), kind="stable")
    path = np.concatenate(nodes[::-1])[order]
    index_X = spread(layout.start_M[path], (layout.stop_M - layout.start_M)[path])
    counts_X = np.concatenate([[0], np.cumsum(mask_X)])
    return counts_X[np.append(0, stop_Q)], index_X[mask_X[:-1]].astype(np.int32)


def _batch(
    flat: Flat,
    layout: Layout,
    shape: tuple[int, int],
    owned: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    names: tuple[str, ...],
) -> PackedBatch:
    """Every field of the rows, from the layout."""
    offsets_Q, index_P, weight_Q, advantage_Q = owned
    size_M = layout.stop_M - layout.start_M
    position = spread(layout.row_M * shape[1] + layout.start_M, size_M)

    def laid_out(values: np.ndarray, filling: int, dtype: type) -> np.ndarray:
        rows = np.full(shape[0] * shape[1], filling, dtype=dtype)
        rows[position] = values
        return rows.reshape(shape)

    previous = spread(layout.start_M - 1, size_M)
    previous[np.cumsum(size_M) - size_M] = np.where(layout.parent_M < 0, -1, layout.stop_M[layout.parent_M] - 1)
    source_RS = laid_out(layout.source, len(flat.tokens_X) - 1, np.int64)
    weights_RS, advantages_RS, mask_RS = loss_fields(
        shape, layout.row_M[layout.leaf_Q], offsets_Q, index_P, weight_Q, advantage_Q
    )
    # A token's sampled sequences may all lie in another row that repeats it: here it is context.
    sampling_RS2 = flat.sampling_X2.view(np.float32).take(source_RS, axis=0)
    experts_RSLK = None
    if flat.experts_XLK is not None and flat.routed_X is not None:
        # Tokens whose experts don't matter get distinct ones, as a router would pick.
        flat.experts_XLK[~flat.routed_X] = np.arange(flat.experts_XLK.shape[-1])
        experts_RSLK = flat.experts_XLK.take(source_RS, axis=0)
    return PackedBatch(
        tokens_RS=flat.tokens_X[source_RS],
        positions_RS=laid_out(spread(layout.above_M, size_M), 0, np.int32),
        nodes_RS=laid_out(np.repeat(np.arange(len(size_M)), size_M), -1, np.int32),
        previous_RS=laid_out(previous, -1, np.int32),
        loss_mask_RS=mask_RS,
        logprobs_RS=np.where(mask_RS, sampling_RS2[..., 0], np.float32(np.nan)),
        advantages_RS=advantages_RS,
        weights_RS=weights_RS,
        temperatures_RS=np.where(mask_RS, sampling_RS2[..., 1], np.float32(1)),
        node_row_M=layout.row_M.astype(np.int32),
        node_start_M=layout.start_M.astype(np.int32),
        node_stop_M=layout.stop_M.astype(np.int32),
        node_parent_M=layout.parent_M.astype(np.int32),
        leaf_Q=layout.leaf_Q.astype(np.int32),
        scored_offsets_Q=offsets_Q.astype(np.int64),
        scored_index_P=index_P,
        sequence_weight_Q=weight_Q,
        sequence_advantage_Q=advantage_Q,
        sequence_ids=names,
        experts_RSLK=experts_RSLK,
    )


def loss_fields(
    shape: tuple[int, int],
    row_Q: np.ndarray,
    offsets_Q: np.ndarray,
    index_P: np.ndarray,
    weight_Q: np.ndarray,
    advantage_Q: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights_RS, advantages_RS, loss_mask_RS) that follow from who owns which token. Sums in
    float64, stored as float32.
    """
    counts_Q = np.diff(offsets_Q)
    flat_P = np.repeat(row_Q.astype(np.int64) * shape[1], counts_Q) + index_P
    weight_P = np.repeat(weight_Q.astype(np.float64), counts_Q)
    size = shape[0] * shape[1]
    weights = np.bincount(flat_P, weights=weight_P, minlength=size)
    advantages = np.bincount(
        flat_P, weights=weight_P * np.repeat(advantage_Q.astype(np.float64), counts_Q), minlength=size
    )
    mask = np.zeros(size, dtype=bool)
    mask[flat_P] = True
    advantages = np.divide(advantages, weights, out=np.zeros(size), where=weights > 0)
    return weights.astype(np.float32).reshape(shape), advantages.astype(np.float32).reshape(shape), mask.reshape(shape)


def packing_metrics(batch: PackedBatch) -> dict[str, float]:
    """padding_share: of all row tokens; shared_share: of the sequences' tokens, how many were not
    computed again; counts.
    """
    computed = int((batch.nodes_RS >= 0).sum())
    lengths_Q = batch.positions_RS[batch.row_Q, batch.node_stop_M[batch.leaf_Q] - 1] + 1
    flat = int(lengths_Q.sum(dtype=np.int64))
    return {
        "rows": float(batch.rows),
        "row_length": float(batch.row_length),
        "sequences": float(len(batch.leaf_Q)),
        "tokens_computed": float(computed),
        "tokens_unpacked": float(flat),
        "padding_share": 1 - computed / batch.tokens_RS.size,
        "shared_share": 1 - computed / flat,
    }


_ARRAYS = tuple(field.name for field in fields(PackedBatch) if field.name != "sequence_ids")
_OPTIONAL = {field.name for field in fields(PackedBatch) if field.default is None}


def save_batch(batch: PackedBatch, path: str | Path) -> None:
    """Write `batch` to one safetensors file: under a temporary name, flushed, renamed. Raises
    OSError for one that can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    arrays = {name: np.ascontiguousarray(value) for name in _ARRAYS if (value := getattr(batch, name)) is not None}
    # One metadata key: the order of several is not fixed, and equal batches shall be equal bytes.
    header = {"lockstep": json.dumps({"schema": SCHEMA, "sequence_ids": batch.sequence_ids})}
    try:
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from None


def load_batch(path: str | Path) -> PackedBatch:
    """Read what `save_batch` wrote. Raises DataError for another kind of file, another schema, or
    missing fields.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("lockstep", "{}"))
            if header.get("schema") != SCHEMA:
                raise DataError(
                    f"{path} has schema {header.get('schema')}, this version reads {SCHEMA}: pack the batch again"
                )
            names = set(file.keys())
            if lost := set(_ARRAYS) - names - _OPTIONAL:
                raise DataError(f"{path} lacks {sorted(lost)[0]}: the file is damaged, pack the batch again")
            arrays = {name: file.get_tensor(name) for name in _ARRAYS if name in names}
            identities = tuple(header["sequence_ids"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a packed batch: {type(error).__name__}: {error}") from None
    return PackedBatch(**arrays, sequence_ids=identities)
