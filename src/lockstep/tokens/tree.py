"""Token sequences to a prefix tree: tokens that may be computed once are stored once.

Two sequences share a token when everything that its computation depends on agrees: all ids up to it, the experts that
must be replayed, and, if both were sampled there, the temperature and the sampling log-probability. Loss mask,
advantage and weight need not agree, since the loss of a token is kept per sequence (see `batch.py`).

Shape suffixes: S tokens of one sequence, X tokens of all sequences end to end, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.errors import DataError


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence. `name` is what errors call it: "group 0, trajectory 3"."""

    name: str
    tokens_S: np.ndarray  # int32
    loss_mask_S: np.ndarray  # bool, True on tokens that were sampled and carry loss
    # float32, sampling logprob; NaN where not sampled (everywhere, if the sequence is only to be scored)
    logprobs_S: np.ndarray
    temperatures_S: np.ndarray  # float32, sampling temperature; 1 where not sampled
    routes_SLK: np.ndarray | None = None  # uint8 or uint16 expert ids
    routed_S: np.ndarray | None = (
        None  # bool, False on tokens whose experts are unknown and don't matter (the last sampled one)
    )
    group: int = 0
    trajectory: int = 0
    steps_S: np.ndarray | None = None  # int32, the step that sampled the token; -1 where not sampled

    def __len__(self) -> int:
        return len(self.tokens_S)

    @property
    def scored(self) -> int:
        """How many tokens carry loss."""
        return int(np.count_nonzero(self.loss_mask_S))

    def cut(self, length: int) -> TokenSequence:
        """The first `length` tokens."""
        return TokenSequence(
            self.name,
            self.tokens_S[:length],
            self.loss_mask_S[:length],
            self.logprobs_S[:length],
            self.temperatures_S[:length],
            None if self.routes_SLK is None else self.routes_SLK[:length],
            None if self.routed_S is None else self.routed_S[:length],
            self.group,
            self.trajectory,
            None if self.steps_S is None else self.steps_S[:length],
        )


def scoring_sequence(name: str, tokens: Sequence[int], routes_SLK: np.ndarray | None = None) -> TokenSequence:
    """A sequence whose every token after the first is to be scored at temperature 1, with no sampling logprobs.

    routes_SLK: experts to replay, one row per token; the last token's may be left out, nothing depends on it.
    Raises DataError if there are fewer or more rows.
    """
    size = len(tokens)
    routed_S = None
    if routes_SLK is not None:
        if len(routes_SLK) not in (size - 1, size):
            raise DataError(f"{name} has {len(routes_SLK)} rows of expert routes for {size} tokens")
        routed_S = np.arange(size) < len(routes_SLK)
        spare = np.broadcast_to(np.arange(routes_SLK.shape[-1]), (1, *routes_SLK.shape[1:])).astype(routes_SLK.dtype)
        routes_SLK = np.concatenate([routes_SLK, spare])[:size]
    return TokenSequence(
        name=name,
        tokens_S=np.asarray(tokens, dtype=np.int32),
        loss_mask_S=np.arange(size) > 0,
        logprobs_S=np.full(size, np.nan, dtype=np.float32),
        temperatures_S=np.ones(size, dtype=np.float32),
        routes_SLK=routes_SLK,
        routed_S=routed_S,
    )


@dataclass(frozen=True)
class Flat:
    """All sequences end to end. A token that several share is the first one's; the others' knowledge of it is merged in there."""

    tokens_X: np.ndarray
    text: bytes  # the same tokens: slices of it compare in one go
    sampled_X: np.ndarray  # bool, sampled in at least one of its sequences
    counts_X: np.ndarray  # int64 [X + 1], sampled tokens before each place, nothing merged
    logprobs_X: np.ndarray
    temperatures_X: np.ndarray
    routes_XLK: np.ndarray | None
    routed_X: np.ndarray | None


def _flat(sequences: Sequence[TokenSequence]) -> Flat:
    tokens_X = np.concatenate([one.tokens_S for one in sequences]).astype(np.int32, copy=False)
    sampled_X = np.concatenate([one.loss_mask_S for one in sequences])
    logprobs_X = np.concatenate([one.logprobs_S for one in sequences])
    temperatures_X = np.concatenate([one.temperatures_S for one in sequences])
    routes = [one.routes_SLK for one in sequences if one.routes_SLK is not None]
    routed = [np.ones(len(one), bool) if one.routed_S is None else one.routed_S for one in sequences if routes]
    return Flat(
        tokens_X,
        tokens_X.tobytes(),
        sampled_X,
        np.concatenate([[0], np.cumsum(sampled_X)]),
        np.where(sampled_X, logprobs_X, np.float32(np.nan)),
        np.where(sampled_X, temperatures_X, np.float32(1)),
        np.concatenate(routes) if routes else None,
        np.concatenate(routed) if routes else None,
    )


@dataclass(eq=False, slots=True)
class Node:
    """A run of tokens: `size` of them from place `start` of the flat arrays on. `ends` are the sequences that stop at its last token."""

    start: int
    size: int
    above: int  # tokens of its ancestors
    sampled: bool  # False only if none of its tokens was sampled
    # Most nodes are leaves: no containers for them. A batch may have hundreds of thousands.
    children: Sequence[Node] = ()
    by_token: dict[int, list[Node]] | None = None  # children by their first token
    ends: list[int] | tuple[()] = ()

    def add(self, child: Node, token: int) -> None:
        if self.by_token is None:
            self.children, self.by_token = [], {}
        self.children.append(child)  # pyright: ignore[reportAttributeAccessIssue]
        self.by_token.setdefault(token, []).append(child)

    def end(self, sequence: int) -> None:
        if isinstance(self.ends, tuple):
            self.ends = []
        self.ends.append(sequence)

    def preorder(self) -> Iterator[Node]:
        """This node and all below it, parents first; no recursion, since chains may be thousands deep."""
        stack: list[Node] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))


def _first_true(flags: np.ndarray) -> int:
    """Index of the first True, or the length."""
    first = int(flags.argmax()) if len(flags) else 0
    return first if first < len(flags) and flags[first] else len(flags)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.int32)


def agreement(flat: Flat, node: Node, at: int, stop: int) -> int:
    """How many tokens of `node`, from its first, a sequence can share that has the places `at` to `stop`."""
    first, size = node.start, min(node.size, stop - at)
    if flat.text[4 * first : 4 * (first + size)] != flat.text[4 * at : 4 * (at + size)]:
        size = _first_true(flat.tokens_X[first : first + size] != flat.tokens_X[at : at + size])
    if node.sampled and flat.counts_X[at + size] > flat.counts_X[at]:
        here, there = slice(first, first + size), slice(at, at + size)
        both = flat.sampled_X[here] & flat.sampled_X[there]
        differ = _bits(flat.logprobs_X[here]) != _bits(flat.logprobs_X[there])
        differ |= flat.temperatures_X[here] != flat.temperatures_X[there]
        size = _first_true(both & differ)
    if flat.routes_XLK is not None and flat.routed_X is not None:
        here, there = slice(first, first + size), slice(at, at + size)
        both = flat.routed_X[here] & flat.routed_X[there]
        size = _first_true(both & (flat.routes_XLK[here] != flat.routes_XLK[there]).any(axis=(1, 2)))
    return size


def _split(flat: Flat, node: Node, size: int) -> None:
    """Cut `node` after `size` tokens: it keeps the upper part, a new child takes the rest and all that hung below."""
    start = node.start + size
    lower = Node(start, node.size - size, node.above + size, node.sampled, node.children, node.by_token, node.ends)
    node.size, node.children, node.by_token, node.ends = size, (), None, ()
    node.add(lower, int(flat.tokens_X[start]))


def _merge(flat: Flat, node: Node, at: int) -> None:
    """Take over what the sequence at `at` knows about the node's tokens and the node does not yet."""
    here, there = slice(node.start, node.start + node.size), slice(at, at + node.size)
    if flat.counts_X[there.stop] > flat.counts_X[at]:
        new = flat.sampled_X[there] & ~flat.sampled_X[here]
        if new.any():
            node.sampled = True
            flat.sampled_X[here][new] = True
            flat.logprobs_X[here][new] = flat.logprobs_X[there][new]
            flat.temperatures_X[here][new] = flat.temperatures_X[there][new]
    if flat.routes_XLK is not None and flat.routed_X is not None:
        new = flat.routed_X[there] & ~flat.routed_X[here]
        if new.any():
            flat.routes_XLK[here][new] = flat.routes_XLK[there][new]
            flat.routed_X[here][new] = True


def _tail(flat: Flat, at: int, stop: int, above: int) -> Node:
    return Node(at, stop - at, above, bool(flat.counts_X[stop] > flat.counts_X[at]))


def _insert(flat: Flat, root: Node, start: int, stop: int, number: int) -> None:
    node, at = root, start
    while at < stop:
        best, size, token = None, 0, int(flat.tokens_X[at])
        for child in node.by_token.get(token, ()) if node.by_token else ():
            agreed = agreement(flat, child, at, stop)
            if agreed > size:
                best, size = child, agreed
        if best is None:
            best, size = _tail(flat, at, stop, at - start), stop - at
            node.add(best, token)
        else:
            if size < best.size:
                _split(flat, best, size)
            _merge(flat, best, at)
        node, at = best, at + size
    node.end(number)


def build(sequences: Sequence[TokenSequence], share: bool = True) -> tuple[Node, Flat]:
    """The prefix tree of `sequences` under an empty root, and the tokens its nodes refer to. `share` False: one branch per sequence,
    whatever they have in common.

    Sequences are numbered as given, which `Node.ends` refers to. Time is linear in the number of tokens.
    """
    root, flat = Node(0, 0, 0, sampled=False), _flat(sequences)
    branches: list[Node] = []
    stops = np.cumsum([len(one) for one in sequences]).tolist()
    for number, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        if share:
            _insert(flat, root, start, stop, number)
        else:
            branch = _tail(flat, start, stop, 0)
            branch.end(number)
            branches.append(branch)
    if not share:
        root.children = branches
    return root, flat
