"""The experts that the server used, from its replies to the tokens of a sequence. Whatever is
incomplete is an error with a name.

With each choice the server sends base64 of a .npy array: one row per token it computed, prompt
included, in order. The last sampled token was never computed. So N sampled tokens after P tokens of
prompt have P + N - 1 rows, or P + N if the server did compute the last. The server makes a digest
over ids and rows. It shows that rows were neither lost, nor moved, nor attached to another choice.

Two records of one token may disagree. Within a trajectory the token keeps the experts of the turn
that first saw it, since they sampled it. Between siblings the prefix tree splits there, so each
sequence keeps its own (`prefix_tree.py`). Both are counted.

Shape suffixes: S tokens, L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.batching.prefix_tree import TokenSequence
from lockstep.errors import DataError
from lockstep_wire.routed_experts import routed_experts_digest


@dataclass(frozen=True)
class RoutedExpertsShape:
    """The shape of a model's routed experts: mixture-of-experts layers, experts per token, experts
    per layer.
    """

    layers: int
    top_k: int
    experts: int

    @property
    def dtype(self) -> type[np.uint8 | np.uint16]:
        """The smallest that holds an expert's number."""
        return np.uint8 if self.experts <= 256 else np.uint16


def _load(npy: bytes, name: str) -> np.ndarray:
    try:
        rows = np.load(io.BytesIO(npy), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{name}: its routed experts are not a .npy array: {error}") from None
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "ui":
        raise DataError(f"{name}: its routed experts are not integers")
    return rows


def decode_routed_experts(
    routed_experts: str | None,
    digest: str | None,
    prompt_ids: Sequence[int] | np.ndarray,
    token_ids: Sequence[int] | np.ndarray,
    shape: RoutedExpertsShape,
    name: str,
) -> np.ndarray:
    """[P + N - 1 or P + N, L, K] uint8 or uint16: the experts of one choice's tokens, checked.

    Raises DataError, naming the choice and the token range. Causes: no routed experts (capture was
    off, or a preempted request lost them), too few or too many rows, another model's shape, rows
    that the server did not make, an expert out of range, an expert twice.
    """
    computed = len(prompt_ids) + len(token_ids) - 1
    tokens = f"tokens 0 to {computed - 1}"
    if routed_experts is None:
        raise DataError(
            f"{name} has no routed experts for {tokens}: roll it out again with the capture of routed experts on, "
            "or train with enable_expert_replay=False"
        )
    try:
        npy = base64.b64decode(routed_experts, validate=True)
    except (ValueError, TypeError):
        raise DataError(f"{name}: its routed experts are not base64") from None
    rows_SLK = _load(npy, name)
    if rows_SLK.ndim != 3 or rows_SLK.shape[1:] != (shape.layers, shape.top_k):
        raise DataError(
            f"{name}: its routed experts have shape {list(rows_SLK.shape)}, "
            f"the model has {shape.layers} layers with {shape.top_k} experts per token"
        )
    if len(rows_SLK) < computed:
        raise DataError(
            f"{name} has routed experts for {len(rows_SLK)} of {computed} tokens: {computed - len(rows_SLK)} are "
            f"lost in {tokens}"
        )
    if len(rows_SLK) > computed + 1:
        raise DataError(f"{name} has {len(rows_SLK)} rows of routed experts for {computed} computed tokens ({tokens})")
    if digest is None:
        raise DataError(
            f"{name} has routed experts without their digest for {tokens}: keep the choice exactly as the "
            "server returned it"
        )
    if digest != routed_experts_digest(prompt_ids, token_ids, npy):
        raise DataError(
            f"{name}: its routed experts are not the ones the server made for {tokens}: rows were changed or moved"
        )
    check_ids(rows_SLK, shape, name)
    return rows_SLK.astype(shape.dtype, copy=False)


def check_ids(rows_SLK: np.ndarray, shape: RoutedExpertsShape, name: str) -> None:
    """Raise DataError, naming the token, for an expert out of range or one that is named twice."""
    if not rows_SLK.size:
        return
    if rows_SLK.min() < 0 or rows_SLK.max() >= shape.experts:
        token = int(((rows_SLK < 0) | (rows_SLK >= shape.experts)).any(axis=(1, 2)).argmax())
        bad = rows_SLK[token][(rows_SLK[token] < 0) | (rows_SLK[token] >= shape.experts)][0]
        raise DataError(f"{name}, token {token}: expert {bad} is out of range, a layer has {shape.experts} experts")
    # A sort for each token and layer takes ten times as long.
    ids_KSL = np.ascontiguousarray(np.moveaxis(rows_SLK, -1, 0))
    twice_SL = np.zeros(rows_SLK.shape[:2], dtype=bool)
    for apart in range(1, len(ids_KSL)):
        twice_SL |= (ids_KSL[apart:] == ids_KSL[:-apart]).any(axis=0)
    if twice_SL.any():
        token = int(twice_SL.any(axis=1).argmax())
        raise DataError(f"{name}, token {token}: a layer names the same expert twice: {rows_SLK[token].tolist()}")


@dataclass(frozen=True)
class Aligned:
    """Routed experts of a sequence. `routed_S` is False only on tokens that no turn computed.

    `disagreeing`: tokens with two different records.
    """

    experts_SLK: np.ndarray
    routed_S: np.ndarray
    disagreeing: int


def align(turns: Sequence[np.ndarray], length: int, name: str) -> Aligned:
    """Lay the routed experts of turns that continue each other over a sequence of `length` tokens,
    earlier turns first.

    Raises DataError if a token other than the last one has no routed experts.
    """
    first = turns[0]
    experts_SLK = np.empty((length, *first.shape[1:]), dtype=first.dtype)
    covered, disagreeing = 0, 0
    for rows_SLK in turns:
        both = min(covered, len(rows_SLK))
        disagreeing += int((rows_SLK[:both] != experts_SLK[:both]).any(axis=(1, 2)).sum())
        if len(rows_SLK) > covered:
            experts_SLK[covered : len(rows_SLK)] = rows_SLK[covered:]
            covered = len(rows_SLK)
    if covered < length - 1:
        raise DataError(f"{name} has no routed experts for tokens {covered} to {length - 2}")
    experts_SLK[covered:] = np.arange(first.shape[-1], dtype=first.dtype)
    return Aligned(experts_SLK, np.arange(length) < covered, disagreeing)


def prefix_disagreement(sequences: Sequence[TokenSequence]) -> tuple[int, int]:
    """(tokens compared, tokens whose routed experts differ) between each sequence and the first of
    its group, over their common prefix of ids.
    """
    first: dict[int, TokenSequence] = {}
    compared = differing = 0
    for sequence in sequences:
        other = first.setdefault(sequence.group, sequence)
        if other is sequence or other.experts_SLK is None or sequence.experts_SLK is None:
            continue
        size = min(len(other), len(sequence))
        unequal_S = other.tokens_S[:size] != sequence.tokens_S[:size]
        size = int(unequal_S.argmax()) if unequal_S.any() else size
        both_S = other.routed_S[:size] & sequence.routed_S[:size]  # type: ignore[index]
        differs_S = (other.experts_SLK[:size] != sequence.experts_SLK[:size]).any(axis=(1, 2))
        compared += int(both_S.sum())
        differing += int((both_S & differs_S).sum())
    return compared, differing
