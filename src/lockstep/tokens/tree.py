"""Token sequences to a prefix tree: tokens that may be computed once are stored once.

Two sequences share a token when everything that its computation depends on agrees: all ids up to it, the experts that
must be replayed, and, if both were sampled there, the temperature and the sampling log-probability. Loss mask,
advantage and weight need not agree, since the loss of a token is kept per sequence (see `batch.py`).

A batch may have hundreds of thousands of sequences, so what is done per sequence is done for all at once, in arrays.

Shape suffixes: S tokens of one sequence, X tokens of all sequences end to end ("places"), Q sequences, N nodes, L MoE layers, K
experts per token, C most likely ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lockstep.errors import DataError

_CHUNK = 1 << 14
"""Tokens whose routes are compared at a time: more would not stay in the cache."""


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
    # int32, the server's most likely ids in the token's place, see top.py; -1 where unknown
    top_SC: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens_S)

    @property
    def scored(self) -> int:
        """How many tokens carry loss."""
        return int(np.count_nonzero(self.loss_mask_S))

    def cut(self, length: int) -> TokenSequence:
        """The first `length` tokens."""
        per_token = [name for name in self.__dataclass_fields__ if name.endswith(("_S", "_SLK", "_SC"))]
        cut = {name: value[:length] for name in per_token if (value := getattr(self, name)) is not None}
        return replace(self, **cut)


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
    """All sequences end to end, and one place of padding after the last."""

    start_Q: np.ndarray
    stop_Q: np.ndarray
    tokens_X: np.ndarray
    sampled_X: np.ndarray  # bool
    sampling_X2: np.ndarray  # log-probability and temperature, where sampled; the bits of float32 as uint32
    routes_XLK: np.ndarray | None
    routed_X: np.ndarray | None

    def known(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What sharers of a token must agree on besides its id: (bool, where it is known; the values there)."""
        sampling = [(self.sampled_X, self.sampling_X2)]
        if self.routes_XLK is None or self.routed_X is None:
            return sampling
        return [(self.routed_X, self.routes_XLK.reshape(len(self.tokens_X), -1)), *sampling]  # a view


def end_to_end(sequences: Sequence[TokenSequence]) -> Flat:
    """All in copies. The first tokens carry no loss, and all sequences have routes, or none."""
    padding = replace(sequences[0].cut(1), tokens_S=np.zeros(1, np.int32), routed_S=np.zeros(1, bool))
    padded = [*sequences, padding]
    length_Q = np.array([len(one.tokens_S) for one in sequences])
    stop_Q = np.cumsum(length_Q)
    sampling_X2 = np.empty((int(stop_Q[-1]) + 1, 2), np.float32)
    np.concatenate([one.logprobs_S for one in padded], out=sampling_X2[:, 0])
    np.concatenate([one.temperatures_S for one in padded], out=sampling_X2[:, 1])
    routes = [one.routes_SLK for one in padded if one.routes_SLK is not None]
    routed = [np.ones(len(one), bool) if one.routed_S is None else one.routed_S for one in padded if routes]
    return Flat(
        start_Q=stop_Q - length_Q,
        stop_Q=stop_Q,
        tokens_X=np.concatenate([one.tokens_S for one in padded], dtype=np.int32),
        sampled_X=np.concatenate([one.loss_mask_S for one in padded]),
        sampling_X2=sampling_X2.view(np.uint32),
        routes_XLK=np.concatenate(routes) if routes else None,
        routed_X=np.concatenate(routed) if routes else None,
    )


def spread(first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`first[0], first[0] + 1, ...` for `size[0]` numbers, then the same for the next, all in one array."""
    before = np.cumsum(size) - size
    return np.repeat(first - before, size) + np.arange(int(size.sum()))


def _equal_paths(above_Q: np.ndarray, size_Q: np.ndarray, key_X: np.ndarray) -> np.ndarray:
    """For each place of `key_X`, where `size_Q` keys follow each other from `above_Q` on, the first with the same way down to it.

    Found by hash and then checked, so no collision gets through: another hash is drawn.
    """
    begin_Q, width = np.cumsum(size_Q) - size_Q, int(size_Q.max())
    depth_X = spread(np.zeros_like(size_Q), size_Q)
    salt = 0
    while True:
        weight = np.random.default_rng(salt).integers(2**64, size=width + 1, dtype=np.uint64)
        term_X = (key_X.astype(np.uint64) + 1) * weight[depth_X]  # no key counts for nothing
        term_X[begin_Q] += above_Q.astype(np.uint64) * weight[width]
        sum_X = np.cumsum(term_X)  # modulo 2^64
        sum_X -= np.repeat(sum_X[begin_Q] - term_X[begin_Q], size_Q)
        _, index, inverse = np.unique(sum_X, return_index=True, return_inverse=True)
        first_X = index[inverse]
        before_X = np.concatenate([[0], first_X[:-1]])
        before_X[begin_Q] = -1 - above_Q
        if np.array_equal(key_X[first_X], key_X) and np.array_equal(before_X[first_X], before_X):
            return first_X
        salt += 1


def _first_places(key_X: np.ndarray, start_Q: np.ndarray, stop_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(For each place the first one whose sequence has the same keys up to there; all places for which it is an earlier one.)

    Goes down in blocks of twice the length, each for the sequences that share all of the last with another, so that what
    nobody shares costs next to nothing.
    """
    first_X, above_Q = np.arange(len(key_X)), np.zeros_like(start_Q)
    shared: list[np.ndarray] = []
    low, width = 0, 1
    while len(start_Q):
        size_Q = np.minimum(stop_Q - start_Q - low, width)
        place = spread(start_Q + low, size_Q)
        first_X[place] = first = place[_equal_paths(above_Q, size_Q, key_X[place])]
        shared.append(place[first != place])
        low, width = low + width, low + width
        longer_Q = stop_Q - start_Q > low
        start_Q, stop_Q = start_Q[longer_Q], stop_Q[longer_Q]
        above_Q = first_X[start_Q + low - 1]
        _, inverse, count = np.unique(above_Q, return_inverse=True, return_counts=True)
        shared_Q = count[inverse] > 1
        start_Q, stop_Q, above_Q = start_Q[shared_Q], stop_Q[shared_Q], above_Q[shared_Q]
    return first_X, np.concatenate(shared)


def _forks(flat: Flat, first_X: np.ndarray, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Place of each sequence's first token that no earlier one has, or its stop; place of the token before that, -1 for none.)"""
    own_Q = flat.start_Q + np.bincount(owners(flat, shared), minlength=len(flat.start_Q))
    return own_Q, np.where(own_Q > flat.start_Q, first_X[own_Q - 1], -1)


def owners(flat: Flat, place: np.ndarray) -> np.ndarray:
    return np.searchsorted(flat.stop_Q, place, side="right")


def _divided(
    flat: Flat, first_X: np.ndarray, shared: np.ndarray, known_X: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same as `_first_places`, with tokens shared only by those whose known `values` agree.

    A sequence that does not know goes with the earlier one that it has the longest way in common with.
    """
    known = shared[known_X[shared]]
    late = known[~known_X[first_X[known]]][::-1]
    holder_X = np.arange(len(first_X))  # the first that knows; of several the last one written stays
    holder_X[first_X[late]] = late
    torn_X = np.zeros(len(first_X), dtype=bool)
    for part in np.array_split(known, len(known) // _CHUNK + 1):
        differ = values[part] != values[holder_X[first_X[part]]]
        torn_X[first_X[part[differ.any(axis=1)]]] = True
    if not torn_X.any():
        return first_X, shared
    torn = np.flatnonzero(torn_X[first_X])
    code_X = np.zeros(len(first_X), dtype=np.int64)
    seen: dict[bytes, int] = {}
    known = torn[known_X[torn]]
    for part in np.array_split(known, len(known) // _CHUNK + 1):
        code_X[part] = [seen.setdefault(row.tobytes(), len(seen)) for row in values[part]]
    # Whoever does not know points to the same depth of its guide, and so on to one that knows.
    unknown = torn[~known_X[torn]]
    owner, guide_Q = owners(flat, unknown), owners(flat, _forks(flat, first_X, shared)[1])
    follows = flat.start_Q[guide_Q[owner]] + unknown - flat.start_Q[owner]
    guide_X = np.arange(len(first_X))
    guide_X[unknown] = np.where(first_X[unknown] == unknown, holder_X[unknown], follows)
    while not np.array_equal(further := guide_X[guide_X[unknown]], guide_X[unknown]):
        guide_X[unknown] = further
    code_X[unknown] = code_X[guide_X[unknown]]
    return _first_places(first_X * len(first_X) + code_X, flat.start_Q, flat.stop_Q)


def _merge(flat: Flat, first_X: np.ndarray, shared: np.ndarray) -> None:
    """Let the place that stands for a token know all that its sharers do."""
    for known_X, values in flat.known():
        new = shared[known_X[shared] & ~known_X[first_X[shared]]]
        values[first_X[new]] = values[new]
        known_X[first_X[new]] = True


@dataclass(frozen=True)
class Tree:
    """Runs of tokens in preorder, siblings by place. `start_N` are places of the flat arrays, `above_N` tokens of a node's ancestors,
    `parent_N` -1 at roots, `count_N` nodes in the subtree, `end_Q` the node whose last token ends a sequence.
    """

    start_N: np.ndarray
    size_N: np.ndarray
    above_N: np.ndarray
    parent_N: np.ndarray
    count_N: np.ndarray
    end_Q: np.ndarray


def build(flat: Flat, share: bool = True) -> Tree:
    """The prefix tree of all sequences; knowledge of shared tokens is merged in `flat`. `share` False: one root per sequence,
    whatever they have in common. Time is linear in the number of tokens, but for sorting.
    """
    own_Q, fork_Q, last_Q = flat.start_Q, np.full(len(flat.start_Q), -1), flat.stop_Q - 1
    if share:
        first_X, shared = _first_places(flat.tokens_X, flat.start_Q, flat.stop_Q)
        for known_X, values in flat.known():
            first_X, shared = _divided(flat, first_X, shared, known_X, values)
        _merge(flat, first_X, shared)
        own_Q, fork_Q = _forks(flat, first_X, shared)
        last_Q = first_X[last_Q]
    begins_X = np.zeros(len(flat.tokens_X), dtype=bool)  # a node ends where another forks off or a sequence ends
    begins_X[fork_Q + 1] = begins_X[last_Q + 1] = True
    begins_X[flat.stop_Q] = False
    begins_X[own_Q[own_Q < flat.stop_Q]] = True
    start_N = np.flatnonzero(begins_X)
    owner_N = owners(flat, start_N)
    stop_N = np.minimum(np.append(start_N[1:], flat.stop_Q[-1]), flat.stop_Q[owner_N])
    parent_N = np.arange(-1, len(start_N) - 1)
    top = np.flatnonzero(start_N == own_Q[owner_N])
    parent_N[top] = np.searchsorted(start_N, fork_Q[owner_N[top]], side="right") - 1
    count_N, place_N = _preorder(parent_N)
    order_N = np.argsort(place_N)
    return Tree(
        start_N=start_N[order_N],
        size_N=(stop_N - start_N)[order_N],
        above_N=(start_N - flat.start_Q[owner_N])[order_N],
        parent_N=np.where(parent_N < 0, -1, place_N[parent_N])[order_N],
        count_N=count_N[order_N],
        end_Q=place_N[np.searchsorted(start_N, last_Q, side="right") - 1],
    )


def _preorder(parent_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Nodes in each subtree, each node's number in preorder) of nodes that come after their parents, in the order of siblings."""
    parents, inner = parent_N.tolist(), np.flatnonzero(parent_N >= 0).tolist()
    count = [1] * len(parents)
    for node in reversed(inner):
        count[parents[node]] += count[node]
    count_N, roots = np.array(count), np.flatnonzero(parent_N < 0)
    place_N = np.zeros(len(parents), dtype=np.int64)
    place_N[roots] = np.cumsum(count_N[roots]) - count_N[roots]
    place = place_N.tolist()
    free = [here + 1 for here in place]  # the number of the next child
    for node in inner:
        parent = parents[node]
        place[node] = free[parent]
        free[parent] += count[node]
        free[node] = place[node] + 1
    return count_N, np.array(place)
