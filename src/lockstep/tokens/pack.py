"""Pack token sequences into a PackedBatch, take it apart again, check it, and keep it in one safetensors file.

Shape suffixes: R rows, S row length, M nodes, Q sequences, P pairs (sequence, token that carries its loss), X tokens of
all sequences end to end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from lockstep.errors import DataError
from lockstep.tokens.batch import PackedBatch
from lockstep.tokens.rows import Part, partition, sizes
from lockstep.tokens.tree import Flat, TokenSequence, build

SCHEMA = "lockstep.packed/1"
AUTO_ROW_LENGTH = 4096
"""Rows grow to this many tokens before a second one is opened, when the caller leaves the length open."""
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
    """Apply the rule for sequences longer than a row. A sequence that is cut before its first scored token is dropped.

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
                "or set over_length to truncate or drop"
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
) -> PackedBatch:
    """Pack `sequences` with one advantage and one weight per scored token each; sequence order is kept in the Q fields.

    row_length: tokens per row; None: the longest sequence, or up to 4096 if there are that many tokens. `multiple`:
    lengths chosen here, and the given one, are rounded up to it. The number of rows is a multiple of `minibatches` x
    `data`: rows of padding go to the end of each minibatch. Equal input and seed give equal bytes.

    Raises DataError: nothing to pack, a sequence longer than a row (see `fit`), a scored first token, fewer rows than
    minibatches.
    """
    _check_input(sequences, advantages_Q, weights_Q)
    random = np.random.default_rng(seed)
    order_Q = random.permutation(len(sequences))
    root, flat = build(sequences, share_prefixes)
    longest = max(map(len, sequences))
    if row_length is None:
        share = -(-sizes(root)[id(root)] // (minibatches * data))
        row_length = max(longest, min(share, AUTO_ROW_LENGTH))
    elif longest > row_length:
        fit(sequences, row_length, "error")
    row_length = -(-row_length // multiple) * multiple
    rows = partition(root, row_length, order_Q)
    if len(rows) < minibatches:
        raise DataError(
            f"the batch fills {len(rows)} rows of {row_length} tokens, too few for minibatches = {minibatches}: "
            "lower minibatches or row_length"
        )
    rows = [rows[i] for i in random.permutation(len(rows))]
    dealt = _deal(rows, minibatches, data)
    return _Writer(sequences, flat, advantages_Q, weights_Q, dealt, row_length).batch()


def minibatch_rows(rows: int, minibatches: int, index: int) -> range:
    """The rows of optimizer step `index` of a batch with `rows` rows."""
    size = rows // minibatches
    return range(index * size, (index + 1) * size)


def _deal(rows: list[list[Part]], minibatches: int, data: int) -> list[list[Part]]:
    """Rows dealt to minibatches in turn, each filled up with empty rows to the same multiple of `data`."""
    size = -(-len(rows) // (minibatches * data)) * data
    dealt: list[list[Part]] = []
    for index in range(minibatches):
        mine = rows[index::minibatches]
        dealt += mine + [[] for _ in range(size - len(mine))]
    return dealt


def _check_input(sequences: Sequence[TokenSequence], advantages_Q: np.ndarray, weights_Q: np.ndarray) -> None:
    if not len(sequences):
        raise DataError("the batch is empty: there is no sequence to pack")
    if not len(sequences) == len(advantages_Q) == len(weights_Q):
        raise ValueError(f"{len(sequences)} sequences, {len(advantages_Q)} advantages, {len(weights_Q)} weights")
    routed = sum(sequence.routes_SLK is not None for sequence in sequences)
    for sequence in sequences:
        if not len(sequence):
            raise DataError(f"{sequence.name} has no tokens")
        if sequence.loss_mask_S[0]:
            raise DataError(
                f"{sequence.name}: its first token carries loss, but nothing predicts it: the prompt is empty"
            )
        if routed and sequence.routes_SLK is None:
            raise DataError(f"{sequence.name} has no expert routes, others have: all or none must be replayed")


def _spread(first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`first[0], first[0] + 1, ...` for `size[0]` numbers, then the same for the next, all in one array."""
    before = np.cumsum(size) - size
    return np.repeat(first - before, size) + np.arange(int(size.sum()))


class _Writer:
    """Lays rows out as arrays."""

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        flat: Flat,
        advantages_Q: np.ndarray,
        weights_Q: np.ndarray,
        rows: list[list[Part]],
        row_length: int,
    ):
        self._sequences = sequences
        self._advantage_Q = np.asarray(advantages_Q, dtype=np.float32)
        self._weight_Q = np.asarray(weights_Q, dtype=np.float32)
        self._row_M: list[int] = []
        self._start_M: list[int] = []
        self._stop_M: list[int] = []
        self._parent_M: list[int] = []
        self._above_M: list[int] = []  # tokens of a node's ancestors
        self._pieces: list[tuple[int, int]] = []  # (place in the flat arrays, tokens) in the order of rows
        self._leaf_Q = np.full(len(sequences), -1, dtype=np.int32)
        for row, trees in enumerate(rows):
            self._lay_out(row, trees)
        self._write(flat, (len(rows), row_length))

    def _lay_out(self, row: int, trees: list[Part]) -> None:
        start = 0
        stack = [(tree, -1) for tree in reversed(trees)]
        while stack:
            part, parent = stack.pop()
            self._above_M.append(part.node.above)
            stop = start + part.node.size
            self._pieces.append((part.node.start, part.node.size))
            while len(part.children) == 1 and not part.ends:  # nothing branches or ends here: one node, not two
                part = part.children[0]
                stop += part.node.size
                self._pieces.append((part.node.start, part.node.size))
            number = len(self._row_M)
            self._row_M.append(row)
            self._start_M.append(start)
            self._stop_M.append(stop)
            self._parent_M.append(parent)
            for sequence in part.ends:
                self._leaf_Q[sequence] = number
            start = stop
            stack.extend([(child, number) for child in reversed(part.children)])

    def _write(self, flat: Flat, shape: tuple[int, int]) -> None:
        """Every field of the rows that follows from the layout."""
        piece_2 = np.array(self._pieces, dtype=np.int64).reshape(-1, 2)
        source = _spread(piece_2[:, 0], piece_2[:, 1])
        row_M, start_M, stop_M = (np.array(x, dtype=np.int64) for x in (self._row_M, self._start_M, self._stop_M))
        size_M, parent_M = stop_M - start_M, np.array(self._parent_M, dtype=np.int64)
        place = _spread(row_M * shape[1] + start_M, size_M)

        def laid_out(values: np.ndarray, filling: object, dtype: type) -> np.ndarray:
            rows = np.full((shape[0] * shape[1], *values.shape[1:]), filling, dtype=dtype)
            rows[place] = values
            return rows.reshape(*shape, *values.shape[1:])

        self._tokens_RS = laid_out(flat.tokens_X[source], 0, np.int32)
        self._logprobs_RS = laid_out(flat.logprobs_X[source], np.nan, np.float32)
        self._temperatures_RS = laid_out(flat.temperatures_X[source], 1, np.float32)
        self._nodes_RS = laid_out(np.repeat(np.arange(len(row_M)), size_M), -1, np.int32)
        self._positions_RS = laid_out(_spread(np.array(self._above_M, dtype=np.int64), size_M), 0, np.int32)
        previous = _spread(start_M - 1, size_M)
        previous[np.cumsum(size_M) - size_M] = np.where(parent_M >= 0, stop_M[parent_M] - 1, -1)
        self._previous_RS = laid_out(previous, -1, np.int32)
        self._routes_RSLK = None
        if flat.routes_XLK is not None and flat.routed_X is not None:
            # Tokens whose experts don't matter get distinct ones, as a router would pick.
            distinct = np.arange(flat.routes_XLK.shape[-1], dtype=flat.routes_XLK.dtype)
            routes = np.where(flat.routed_X[source][:, None, None], flat.routes_XLK[source], distinct)
            self._routes_RSLK = laid_out(routes, distinct, flat.routes_XLK.dtype.type)

    def _scored_index(self) -> tuple[np.ndarray, np.ndarray]:
        """(row index of every scored token, sequence by sequence; how many each sequence has)."""
        starts, stops, parents = self._start_M, self._stop_M, self._parent_M
        first: list[int] = []
        size: list[int] = []
        for leaf in self._leaf_Q.tolist():
            path = [leaf]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            first += [starts[node] for node in reversed(path)]
            size += [stops[node] - starts[node] for node in reversed(path)]
        mask_S = np.concatenate([sequence.loss_mask_S for sequence in self._sequences])
        index = _spread(np.array(first, dtype=np.int64), np.array(size, dtype=np.int64))[mask_S]
        ends_Q = np.cumsum([len(sequence) for sequence in self._sequences])
        return index, np.diff(np.concatenate([[0], np.cumsum(mask_S)])[ends_Q], prepend=0)

    def batch(self) -> PackedBatch:
        rows, length = self._tokens_RS.shape
        index, counts_Q = self._scored_index()
        offsets_Q = np.concatenate([[0], np.cumsum(counts_Q)]).astype(np.int64)
        index_P = index.astype(np.int32)
        row_M = np.array(self._row_M, dtype=np.int32)
        weights_RS, advantages_RS, mask_RS = loss_fields(
            (rows, length), row_M[self._leaf_Q], offsets_Q, index_P, self._weight_Q, self._advantage_Q
        )
        # A token's sampled sequences may all lie in another row that repeats it: here it is context.
        self._logprobs_RS[~mask_RS] = np.nan
        self._temperatures_RS[~mask_RS] = 1
        return PackedBatch(
            tokens_RS=self._tokens_RS,
            positions_RS=self._positions_RS,
            nodes_RS=self._nodes_RS,
            previous_RS=self._previous_RS,
            loss_mask_RS=mask_RS,
            logprobs_RS=self._logprobs_RS,
            advantages_RS=advantages_RS,
            weights_RS=weights_RS,
            temperatures_RS=self._temperatures_RS,
            node_row_M=row_M,
            node_start_M=np.array(self._start_M, dtype=np.int32),
            node_stop_M=np.array(self._stop_M, dtype=np.int32),
            node_parent_M=np.array(self._parent_M, dtype=np.int32),
            leaf_Q=self._leaf_Q,
            scored_offsets_Q=offsets_Q,
            scored_index_P=index_P,
            sequence_weight_Q=self._weight_Q,
            sequence_advantage_Q=self._advantage_Q,
            sequence_ids=tuple(sequence.name for sequence in self._sequences),
            routes_RSLK=self._routes_RSLK,
        )


def loss_fields(
    shape: tuple[int, int],
    row_Q: np.ndarray,
    offsets_Q: np.ndarray,
    index_P: np.ndarray,
    weight_Q: np.ndarray,
    advantage_Q: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights_RS, advantages_RS, loss_mask_RS) that follow from who owns which token. Sums in float64, stored as
    float32.
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


def flatten(batch: PackedBatch) -> list[TokenSequence]:
    """The sequences of a batch as they went in (routes of tokens whose experts did not matter may differ)."""
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
                routes_SLK=None if batch.routes_RSLK is None else batch.routes_RSLK[row, index],
                routed_S=None if batch.routes_RSLK is None else np.ones(len(index), dtype=bool),
            )
        )
    return sequences


def packing_metrics(batch: PackedBatch) -> dict[str, float]:
    """padding_share: of all row tokens; shared_share: of the sequences' tokens, how many were not computed again;
    counts.
    """
    computed = int((batch.nodes_RS >= 0).sum())
    length_M = (batch.node_stop_M - batch.node_start_M).astype(np.int64)
    depth_M = np.zeros(len(length_M), dtype=np.int64)  # tokens from the root to the node's end; parents come first
    for node, parent in enumerate(batch.node_parent_M.tolist()):
        depth_M[node] = length_M[node] + (depth_M[parent] if parent >= 0 else 0)
    flat = int(depth_M[batch.leaf_Q].sum())
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


def save_batch(batch: PackedBatch, path: str | Path) -> None:
    """Write `batch` to one safetensors file: under a temporary name, flushed, renamed."""
    from safetensors.numpy import save_file

    path = Path(path)
    arrays = {name: np.ascontiguousarray(value) for name in _ARRAYS if (value := getattr(batch, name)) is not None}
    # One metadata key: the order of several is not fixed, and equal batches shall be equal bytes.
    header = {"lockstep": json.dumps({"schema": SCHEMA, "sequence_ids": batch.sequence_ids})}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(arrays, temporary, metadata=header)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load_batch(path: str | Path) -> PackedBatch:
    """Read what `save_batch` wrote. Raises DataError for another kind of file, another schema, or missing fields."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("lockstep", "{}"))
            if header.get("schema") != SCHEMA:
                raise DataError(
                    f"{path} has schema {header.get('schema')}, this version reads {SCHEMA}: pack the batch again"
                )
            names = set(file.keys())
            if lost := set(_ARRAYS) - names - {"routes_RSLK", "current_RS"}:
                raise DataError(f"{path} lacks {sorted(lost)[0]}: the file is damaged, pack the batch again")
            arrays = {name: file.get_tensor(name) for name in _ARRAYS if name in names}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a packed batch: {error}") from None
    return PackedBatch(**arrays, sequence_ids=tuple(header["sequence_ids"]))
