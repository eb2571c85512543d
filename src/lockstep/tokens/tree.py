"""Token sequences to a prefix tree: tokens that may be computed once are stored once.

Two sequences share a token when everything that its computation depends on agrees: all ids up to it, the experts that
must be replayed, and, if both were sampled there, the temperature and the sampling log-probability. Loss mask,
advantage and weight need not agree, since the loss of a token is kept per sequence (see `batch.py`).

Shape suffixes: S tokens of one sequence, T tokens of one node, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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


@dataclass(eq=False)
class Node:
    """A run of tokens. Arrays are merged over the sequences that share them; `ends` are the sequences that stop at its
    last token.
    """

    tokens_T: np.ndarray
    sampled_T: np.ndarray  # bool, sampled in at least one of its sequences
    logprobs_T: np.ndarray
    temperatures_T: np.ndarray
    routes_TLK: np.ndarray | None
    routed_T: np.ndarray | None
    above: int  # tokens of its ancestors
    children: list[Node] = field(default_factory=list)
    by_token: dict[int, list[Node]] = field(default_factory=dict)  # children by their first token
    ends: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens_T)

    def add(self, child: Node) -> None:
        self.children.append(child)
        self.by_token.setdefault(int(child.tokens_T[0]), []).append(child)

    def preorder(self) -> Iterator[Node]:
        """This node and all below it, parents first; no recursion, since chains may be thousands deep."""
        stack: list[Node] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))


def _tail(sequence: TokenSequence, start: int) -> Node:
    return Node(
        sequence.tokens_S[start:],
        sequence.loss_mask_S[start:].copy(),
        np.where(sequence.loss_mask_S[start:], sequence.logprobs_S[start:], np.float32(np.nan)),
        np.where(sequence.loss_mask_S[start:], sequence.temperatures_S[start:], np.float32(1)),
        None if sequence.routes_SLK is None else sequence.routes_SLK[start:].copy(),
        None if sequence.routed_S is None else sequence.routed_S[start:].copy(),
        above=start,
    )


def _first_true(flags: np.ndarray) -> int:
    """Index of the first True, or the length."""
    first = int(flags.argmax()) if len(flags) else 0
    return first if first < len(flags) and flags[first] else len(flags)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.int32)


def agreement(node: Node, sequence: TokenSequence, start: int) -> int:
    """How many tokens of `node`, from its first, `sequence` can share from its position `start` on."""
    size = min(len(node), len(sequence) - start)
    size = _first_true(node.tokens_T[:size] != sequence.tokens_S[start : start + size])
    here, there = slice(0, size), slice(start, start + size)
    both = node.sampled_T[here] & sequence.loss_mask_S[there]
    if both.any():
        differ = _bits(node.logprobs_T[here]) != _bits(sequence.logprobs_S[there])
        differ |= node.temperatures_T[here] != sequence.temperatures_S[there]
        size = _first_true(both & differ)
        here, there = slice(0, size), slice(start, start + size)
    if node.routes_TLK is not None and sequence.routes_SLK is not None:
        both = node.routed_T[here] & sequence.routed_S[there]  # type: ignore[index]
        size = _first_true(both & (node.routes_TLK[here] != sequence.routes_SLK[there]).any(axis=(1, 2)))
    return size


def _split(node: Node, size: int) -> None:
    """Cut `node` after `size` tokens: it keeps the upper part, a new child takes the rest and all that hung below."""
    lower = Node(
        node.tokens_T[size:],
        node.sampled_T[size:],
        node.logprobs_T[size:],
        node.temperatures_T[size:],
        None if node.routes_TLK is None else node.routes_TLK[size:],
        None if node.routed_T is None else node.routed_T[size:],
        node.above + size,
        node.children,
        node.by_token,
        node.ends,
    )
    node.tokens_T, node.sampled_T = node.tokens_T[:size], node.sampled_T[:size]
    node.logprobs_T, node.temperatures_T = node.logprobs_T[:size], node.temperatures_T[:size]
    if node.routes_TLK is not None and node.routed_T is not None:
        node.routes_TLK, node.routed_T = node.routes_TLK[:size], node.routed_T[:size]
    node.children, node.by_token, node.ends = [], {}, []
    node.add(lower)


def _merge(node: Node, sequence: TokenSequence, start: int) -> None:
    """Take over what `sequence` knows about the node's tokens and the node does not yet."""
    there = slice(start, start + len(node))
    new_T = sequence.loss_mask_S[there] & ~node.sampled_T
    if new_T.any():
        node.sampled_T[new_T] = True
        node.logprobs_T[new_T] = sequence.logprobs_S[there][new_T]
        node.temperatures_T[new_T] = sequence.temperatures_S[there][new_T]
    if node.routes_TLK is not None and sequence.routes_SLK is not None:
        new_T = sequence.routed_S[there] & ~node.routed_T  # type: ignore[index,operator]
        if new_T.any():
            node.routes_TLK[new_T] = sequence.routes_SLK[there][new_T]
            node.routed_T[new_T] = True  # type: ignore[index]


def _insert(root: Node, sequence: TokenSequence, number: int) -> None:
    node, start = root, 0
    while start < len(sequence):
        best, size = None, 0
        for child in node.by_token.get(int(sequence.tokens_S[start]), ()):
            agreed = agreement(child, sequence, start)
            if agreed > size:
                best, size = child, agreed
        if best is None:
            best, size = _tail(sequence, start), len(sequence) - start
            node.add(best)
        elif size < len(best):
            _split(best, size)
        _merge(best, sequence, start)
        node, start = best, start + size
    node.ends.append(number)


def _empty() -> Node:
    nothing = np.empty(0, dtype=np.float32)
    return Node(nothing.astype(np.int32), nothing.astype(bool), nothing, nothing, None, None, above=0)


def build(sequences: Sequence[TokenSequence], share: bool = True) -> Node:
    """The prefix tree of `sequences` under an empty root. `share` False: one branch per sequence, whatever they have in
    common.

    Sequences are numbered as given, which `Node.ends` refers to. Time is linear in the number of tokens.
    """
    root = _empty()
    for number, sequence in enumerate(sequences):
        if share:
            _insert(root, sequence, number)
        else:
            branch = _tail(sequence, 0)
            branch.ends.append(number)
            root.children.append(branch)
    return root
