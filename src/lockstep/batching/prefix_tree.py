"""Token sequences to a prefix tree: tokens that may be computed once are stored once.

Two sequences share a token when everything agrees that the token's computation depends on. That is:
all ids up to the token, the replayed experts and, if both sampled the token, temperature and
sampling log-probability. Loss mask, advantage and weight need not agree, since the loss of a token
is kept per sequence (see `packed_batch.py`).

A batch may have hundreds of thousands of sequences, so work per sequence is done for all at once,
in arrays.

Shape suffixes: S tokens of one sequence, X tokens of all sequences end to end ("positions"), Q
sequences, N nodes, L MoE layers, K experts per token, C most likely ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from lockstep.errors import DataError

_CHUNK = 1 << 12
"""Tokens or sequences at a time: what belongs to more would not stay in the cache."""
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""Spreads hashes over a table; multiplying by an odd number maps no two to one."""


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence. `name` is what errors call it: "group 0, trajectory 3"."""

    name: str
    tokens_S: np.ndarray  # int32
    loss_mask_S: np.ndarray  # bool, True on tokens that were sampled and carry loss
    # float32, sampling logprob; NaN where not sampled (everywhere, if the sequence is only to be
    # scored)
    logprobs_S: np.ndarray
    temperatures_S: np.ndarray  # float32, sampling temperature; 1 where not sampled
    experts_SLK: np.ndarray | None = None  # uint8 or uint16 expert ids
    routed_S: np.ndarray | None = (
        None  # bool, False on tokens whose experts are unknown and don't matter (the last sampled one)
    )
    group: int = 0
    trajectory: int = 0
    steps_S: np.ndarray | None = None  # int32, the step that sampled the token; -1 where not sampled
    # int32, the server's most likely ids at the token's position, see top_logprobs.py; -1 where
    # unknown
    top_SC: np.ndarray | None = None
    turn: int = -1  # the one turn that carries loss; -1: all

    def __len__(self) -> int:
        return len(self.tokens_S)

    @property
    def scored(self) -> int:
        """The number of tokens that carry loss."""
        return int(np.count_nonzero(self.loss_mask_S))

    def cut(self, length: int) -> TokenSequence:
        """The first `length` tokens."""
        per_token = [name for name in self.__dataclass_fields__ if name.endswith(("_S", "_SLK", "_SC"))]
        cut = {name: value[:length] for name in per_token if (value := getattr(self, name)) is not None}
        return replace(self, **cut)


def scoring_sequence(name: str, tokens: Sequence[int], experts_SLK: np.ndarray | None = None) -> TokenSequence:
    """A sequence whose every token after the first is to be scored at temperature 1, with no
    sampling logprobs.

    experts_SLK: experts to replay, one row per token; the last token's may be left out, nothing
        depends on it.

    Raises DataError if there are fewer or more rows.
    """
    size = len(tokens)
    routed_S = None
    if experts_SLK is not None:
        if len(experts_SLK) not in (size - 1, size):
            raise DataError(f"{name} has {len(experts_SLK)} rows of routed experts for {size} tokens")
        routed_S = np.arange(size) < len(experts_SLK)
        spare = np.broadcast_to(np.arange(experts_SLK.shape[-1]), (1, *experts_SLK.shape[1:])).astype(experts_SLK.dtype)
        experts_SLK = np.concatenate([experts_SLK, spare])[:size]
    return TokenSequence(
        name=name,
        tokens_S=np.asarray(tokens, dtype=np.int32),
        loss_mask_S=np.arange(size) > 0,
        logprobs_S=np.full(size, np.nan, dtype=np.float32),
        temperatures_S=np.ones(size, dtype=np.float32),
        experts_SLK=experts_SLK,
        routed_S=routed_S,
    )


@dataclass(frozen=True)
class Flat:
    """All sequences end to end, and one position of padding after the last."""

    start_Q: np.ndarray
    stop_Q: np.ndarray
    tokens_X: np.ndarray
    sampled_X: np.ndarray  # bool
    sampling_X2: np.ndarray  # log-probability and temperature, where sampled; the bits of float32 as uint32
    experts_XLK: np.ndarray | None
    routed_X: np.ndarray | None

    def known(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The values that sharers of a token must agree on besides its id: (bool, where the value
        is known; the values there).
        """
        sampling = [(self.sampled_X, self.sampling_X2)]
        if self.experts_XLK is None or self.routed_X is None:
            return sampling
        return [(self.routed_X, self.experts_XLK.reshape(len(self.tokens_X), -1)), *sampling]  # a view


def end_to_end(sequences: Sequence[TokenSequence]) -> Flat:
    """All in copies.

    Raises DataError naming a sequence without tokens, with a scored first token, or without routed
    experts where others have some.
    """
    length_Q = np.fromiter(map(len, map(attrgetter("tokens_S"), sequences)), np.int64, len(sequences))
    if not length_Q.all():
        raise DataError(f"{sequences[int(length_Q.argmin())].name} has no tokens")
    start_Q, positions = np.cumsum(length_Q) - length_Q, int(length_Q.sum()) + 1
    routed_experts = [sequence.experts_SLK for sequence in sequences if sequence.experts_SLK is not None]
    if 0 < len(routed_experts) < len(sequences):
        bare = next(sequence for sequence in sequences if sequence.experts_SLK is None)
        raise DataError(f"{bare.name} has no routed experts, others have: all or none must be replayed")
    routed_X = None
    if routed_experts:
        routed_X = np.arange(positions) < positions - 1  # all but the padding
        for start, sequence in zip(start_Q.tolist(), sequences, strict=True):
            if sequence.routed_S is not None:
                routed_X[start : start + len(sequence)] = sequence.routed_S
    sampling = [_joined(sequences, field, positions, np.float32) for field in ("logprobs_S", "temperatures_S")]
    flat = Flat(
        start_Q=start_Q,
        stop_Q=start_Q + length_Q,
        tokens_X=_joined(sequences, "tokens_S", positions, np.int32),
        sampled_X=_joined(sequences, "loss_mask_S", positions, np.bool_),
        sampling_X2=np.stack(sampling, axis=1).view(np.uint32),
        experts_XLK=np.concatenate([*routed_experts, routed_experts[0][:1]]) if routed_experts else None,
        routed_X=routed_X,
    )
    if (unpredicted_Q := flat.sampled_X[start_Q]).any():
        name = sequences[int(unpredicted_Q.argmax())].name
        raise DataError(f"{name}: its first token carries loss, but nothing predicts it: the prompt is empty")
    return flat


def _joined(sequences: Sequence[TokenSequence], field: str, positions: int, dtype: type[np.generic]) -> np.ndarray:
    """A field of all sequences and a 0 of padding. `np.concatenate` takes twice as long if they are
    short.
    """
    joined, size, fits = bytearray(), np.dtype(dtype).itemsize, True
    for first in range(0, len(sequences), _CHUNK):
        arrays = [getattr(sequence, field) for sequence in sequences[first : first + _CHUNK]]
        fits = (
            fits and arrays[0].dtype == dtype
        )  # of the others the size must do: looking at each would double the time
        joined += b"".join(arrays)
    if not fits or len(joined) != (positions - 1) * size:
        wrong = next(o for o in sequences if getattr(o, field).dtype != dtype or len(getattr(o, field)) != len(o))
        raise ValueError(f"{wrong.name}: {field} must be {len(wrong)} x {dtype.__name__}")
    return np.frombuffer(joined + bytes(size), dtype)


def spread(first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`first[0], first[0] + 1, ...` for `size[0]` numbers, then the same for the next, all in one
    array.
    """
    before = np.cumsum(size) - size
    spread_X = np.repeat(first - before, size)
    spread_X += np.arange(len(spread_X))
    return spread_X


def _first_equal(key: np.ndarray) -> np.ndarray:
    """For each uint64 the index of the first equal value: a hash table that is filled and read for
    all values at once.
    """
    first, left, bits = np.empty(len(key), dtype=np.int64), np.arange(len(key)), len(key).bit_length()
    table = np.empty(1 << bits, dtype=np.int64)
    while len(left):
        key = key * _ODD  # so those that meet in a slot part in the next round
        slot = (key >> np.uint64(64 - bits)).view(np.int64)
        table[slot[::-1]] = np.arange(len(left))[::-1]  # of several the last one written stays
        holder = table[slot]
        first[left] = left[holder]
        other = np.flatnonzero(key[holder] != key)
        left, key = left[other], key[other]
    return first


def _common_runs(hash_X: np.ndarray, start_Q: np.ndarray, stop_Q: np.ndarray) -> list[tuple[np.ndarray, ...]] | None:
    """Runs of tokens that sequences have in common with an earlier one: (starts, starts in that
    one, sizes). In that one, parts of a run may be in a later entry of the list.

    Binary search for the first difference, for all sequences in parallel. Cost grows with the
    number of sequences and only logarithmically with their length. `hash_X` is summed over all
    positions before. None: sequences that are not alike have the same hash.
    """
    low, stop, before, group = start_Q, stop_Q, hash_X[start_Q], np.zeros_like(start_Q)
    groups, runs = 1, []  # of candidates that have everything up to `low` in common
    for exponent in reversed(range(int((stop_Q - start_Q).max()).bit_length())):
        middle = np.minimum(low + (1 << exponent), stop)
        size = middle - low
        first = _first_equal(hash_X[middle] - before)
        if (group[first] != group).any() or (size[first] != size).any():
            return None
        own = first == np.arange(len(first))
        late = np.flatnonzero(~own)
        runs.append((low[late], low[first[late]], size[late]))
        left = np.flatnonzero(own & (np.bincount(group[own], minlength=groups)[group] > 1))
        right = np.flatnonzero((middle < stop) & (np.bincount(first)[first] > 1))
        low, stop = np.concatenate([low[left], middle[right]]), np.concatenate([middle[left], stop[right]])
        before = np.concatenate([before[left], before[right]])
        group = np.concatenate([group[left], groups + first[right]])
        groups += len(first)
    return runs


def _first_positions(key_X: np.ndarray, start_Q: np.ndarray, stop_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(For each position, the first position whose sequence has the same keys up to there. All
    positions that are such a first position of another sequence.)

    Found by hash and then checked, so no collision gets through: another hash is drawn.
    """
    depth_X = spread(np.zeros_like(start_Q), stop_Q - start_Q)
    salt = 0
    while True:
        weight = np.random.default_rng(salt).integers(2**64, size=int(depth_X.max()) + 1, dtype=np.uint64)
        hash_X = np.zeros(len(key_X), dtype=np.uint64)
        hash_X[1:] = key_X[:-1]
        hash_X[1:] += 1  # no key counts for nothing
        hash_X[1:] *= weight[depth_X]
        np.cumsum(hash_X, out=hash_X)  # modulo 2^64
        runs = _common_runs(hash_X, start_Q, stop_Q)
        first_X = np.arange(len(key_X))
        for start, earlier, size in reversed(runs or []):
            position = spread(start, size)
            first_X[position] = first_X[position + np.repeat(earlier - start, size)]
        shared = np.flatnonzero(first_X != np.arange(len(key_X)))
        if runs is not None and np.array_equal(key_X[first_X[shared]], key_X[shared]):
            return first_X, shared
        salt += 1


def _forks(flat: Flat, first_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(The position of each sequence's first token that no earlier sequence has, or its stop. The
    position of the token before that; -1 for none.)
    """
    shared_X = first_X[:-1] != np.arange(len(first_X) - 1)
    own_Q = flat.start_Q + np.add.reduceat(shared_X, flat.start_Q, dtype=np.int64)
    return own_Q, np.where(own_Q > flat.start_Q, first_X[own_Q - 1], -1)


def owners(flat: Flat, position: np.ndarray) -> np.ndarray:
    return np.searchsorted(flat.stop_Q, position, side="right")


def _divided(
    flat: Flat, first_X: np.ndarray, shared: np.ndarray, known_X: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same as `_first_positions`, with tokens shared only by those whose known `values` agree.

    A sequence that does not know goes with the earlier one that it has the longest way in common
    with.
    """
    known = shared[known_X[shared]]
    late = known[~known_X[first_X[known]]][::-1]
    holder_X = np.arange(len(first_X))  # the first that knows; of several the last one written stays
    holder_X[first_X[late]] = late
    torn_X = np.zeros(len(first_X), dtype=bool)
    for part in np.array_split(known, len(known) // _CHUNK + 1):
        differ = values.take(part, axis=0) != values.take(holder_X[first_X[part]], axis=0)
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
    owner, guide_Q = owners(flat, unknown), owners(flat, _forks(flat, first_X)[1])
    follows = flat.start_Q[guide_Q[owner]] + unknown - flat.start_Q[owner]
    guide_X = np.arange(len(first_X))
    guide_X[unknown] = np.where(first_X[unknown] == unknown, holder_X[unknown], follows)
    while not np.array_equal(further := guide_X[guide_X[unknown]], guide_X[unknown]):
        guide_X[unknown] = further
    code_X[unknown] = code_X[guide_X[unknown]]
    return _first_positions(first_X * len(first_X) + code_X, flat.start_Q, flat.stop_Q)


def _merge(flat: Flat, first_X: np.ndarray, shared: np.ndarray) -> None:
    """Let the position that stands for a token know all that its sharers do."""
    for known_X, values in flat.known():
        new = shared[known_X[shared] & ~known_X[first_X[shared]]]
        values[first_X[new]] = values[new]
        known_X[first_X[new]] = True


@dataclass(frozen=True)
class Tree:
    """Runs of tokens in preorder, siblings by position.

    `start_N`: positions in the flat arrays.
    `above_N`: tokens of a node's ancestors.
    `parent_N`: -1 at roots.
    `count_N`: nodes in the subtree.
    `end_Q`: the node whose last token ends a sequence.
    """

    start_N: np.ndarray
    size_N: np.ndarray
    above_N: np.ndarray
    parent_N: np.ndarray
    count_N: np.ndarray
    end_Q: np.ndarray


def build(flat: Flat, share: bool = True) -> Tree:
    """The prefix tree of all sequences; knowledge of shared tokens is merged in `flat`. `share`
    False: one root per sequence, whatever they have in common. Time is linear in the number of
    tokens, but for sorting.
    """
    own_Q, fork_Q, last_Q = flat.start_Q, np.full(len(flat.start_Q), -1), flat.stop_Q - 1
    if share:
        first_X, shared = _first_positions(flat.tokens_X, flat.start_Q, flat.stop_Q)
        for known_X, values in flat.known():
            first_X, shared = _divided(flat, first_X, shared, known_X, values)
        _merge(flat, first_X, shared)
        own_Q, fork_Q = _forks(flat, first_X)
        last_Q = first_X[last_Q]
    begins_X = np.zeros(len(flat.tokens_X), dtype=bool)  # a node ends where another forks off or a sequence ends
    begins_X[fork_Q + 1] = begins_X[last_Q + 1] = True
    begins_X[flat.stop_Q] = False
    begins_X[own_Q[own_Q < flat.stop_Q]] = True
    start_N, node_X = np.flatnonzero(begins_X), np.cumsum(begins_X) - 1
    owner_N = owners(flat, start_N)
    stop_N = np.minimum(np.append(start_N[1:], flat.stop_Q[-1]), flat.stop_Q[owner_N])
    parent_N = np.arange(-1, len(start_N) - 1)
    top = np.flatnonzero(start_N == own_Q[owner_N])
    fork = fork_Q[owner_N[top]]
    parent_N[top] = np.where(fork < 0, -1, node_X[fork])
    count_N, place_N = _preorder(parent_N)
    order_N = np.empty_like(place_N)
    order_N[place_N] = np.arange(len(place_N))
    return Tree(
        start_N=start_N[order_N],
        size_N=(stop_N - start_N)[order_N],
        above_N=(start_N - flat.start_Q[owner_N])[order_N],
        parent_N=np.where(parent_N < 0, -1, place_N[parent_N])[order_N],
        count_N=count_N[order_N],
        end_Q=place_N[node_X[last_Q]],
    )


def _preorder(parent_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Nodes in each subtree, each node's number in preorder) of nodes that come after their
    parents, in the order of siblings.
    """
    node_N, count_N = np.arange(len(parent_N)), np.ones_like(parent_N)
    jumps, up_N = [], parent_N  # the first, second, fourth ... ancestor of those that have one
    while len(deep := np.flatnonzero(up_N >= 0)):
        jumps.append((deep, up_N[deep]))
        up_N = np.where(up_N < 0, -1, up_N[up_N])
    for deep, above in jumps:
        count_N += np.bincount(above, count_N[deep], len(count_N)).astype(np.int64)
    siblings = np.sort((parent_N + 1) * len(parent_N) + node_N) % len(parent_N)
    before = np.cumsum(count_N[siblings]) - count_N[siblings]
    first = np.searchsorted(parent_N[siblings], parent_N[siblings])
    place_N = np.empty_like(parent_N)
    place_N[siblings] = before - before[first] + (parent_N[siblings] >= 0)
    for deep, above in jumps:
        place_N[deep] += place_N[above]
    return count_N, place_N
