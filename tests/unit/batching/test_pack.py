"""The packer: nothing is lost, nothing is computed twice that need not be, and equal input gives equal bytes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_check import flatten, validate
from helpers import python_path
from lockstep.batching.bin_packing import best_fit
from lockstep.batching.pack import fit, load_batch, minibatch_rows, pack, packing_metrics, save_batch
from lockstep.batching.packed_batch import PackedBatch, scored_row, total_weight, unpack_scores
from lockstep.batching.prefix_tree import TokenSequence, scoring_sequence
from lockstep.errors import DataError
from random_batches import random_sequences, seeds


def packed(sequences: list[TokenSequence], seed: int = 0, **options) -> PackedBatch:
    random = np.random.default_rng(seed)
    advantages, weights = random.normal(size=len(sequences)), random.uniform(0.1, 2, size=len(sequences))
    return pack(sequences, advantages, weights, seed=seed, **options)


def assert_same_sequences(before: list[TokenSequence], after: list[TokenSequence]) -> None:
    assert [sequence.name for sequence in before] == [sequence.name for sequence in after]
    for sequence, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(sequence.tokens_S, other.tokens_S)
        np.testing.assert_array_equal(sequence.loss_mask_S, other.loss_mask_S)
        np.testing.assert_array_equal(sequence.logprobs_S, other.logprobs_S)
        np.testing.assert_array_equal(sequence.temperatures_S, other.temperatures_S)
        if sequence.experts_SLK is not None:
            assert sequence.routed_S is not None
            assert other.experts_SLK is not None
            np.testing.assert_array_equal(sequence.experts_SLK[sequence.routed_S], other.experts_SLK[sequence.routed_S])


@settings(max_examples=150, deadline=None)
@given(
    seed=seeds,
    leaves=st.integers(1, 16),
    tight=st.booleans(),
    share=st.booleans(),
    data=st.integers(1, 3),
    routed_experts=st.sampled_from([None, (2, 2, 5)]),
)
def test_packing_keeps_every_sequence(seed, leaves, tight, share, data, routed_experts):
    sequences = random_sequences(np.random.default_rng(seed), leaves, routed_experts=routed_experts)
    longest = max(map(len, sequences))
    batch = packed(sequences, seed, row_length=longest if tight else None, share_prefixes=share, data=data, multiple=1)
    validate(batch, experts=None if routed_experts is None else routed_experts[2])
    assert batch.rows % data == 0
    assert_same_sequences(sequences, flatten(batch))
    scored = sum(sequence.scored for sequence in sequences)
    assert len(batch.scored_index_P) == scored
    expected = sum(float(w) * sequence.scored for w, sequence in zip(batch.sequence_weight_Q, sequences, strict=True))
    assert total_weight(batch) == pytest.approx(expected, rel=1e-12)
    assert sum(total_weight(batch, [row]) for row in range(batch.rows)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, leaves=st.integers(2, 12))
def test_a_wide_row_holds_each_distinct_prefix_once(seed, leaves):
    """With all attributes equal, the number of computed tokens is the number of distinct prefixes, the least there can
    be.
    """
    sequences = [
        scoring_sequence(sequence.name, sequence.tokens_S.tolist())
        for sequence in random_sequences(np.random.default_rng(seed), leaves, vocabulary=3)
    ]
    batch = packed(sequences, seed, row_length=sum(map(len, sequences)))
    prefixes = {tuple(sequence.tokens_S[: n + 1].tolist()) for sequence in sequences for n in range(len(sequence))}
    assert int((batch.nodes_RS >= 0).sum()) == len(prefixes)
    apart = packed(sequences, seed, row_length=sum(map(len, sequences)), share_prefixes=False)
    assert int((apart.nodes_RS >= 0).sum()) == sum(map(len, sequences))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, leaves=st.integers(1, 16))
def test_equal_input_gives_equal_bytes(seed, leaves, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    for name in "ab":
        save_batch(packed(random_sequences(np.random.default_rng(seed), leaves), seed), folder / name)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    loaded = load_batch(folder / "a")
    validate(loaded)
    assert_same_sequences(random_sequences(np.random.default_rng(seed), leaves), flatten(loaded))


def test_bytes_do_not_depend_on_the_process(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from random_batches import random_sequences\n"
        "from lockstep.batching.pack import pack, save_batch\n"
        "s = random_sequences(np.random.default_rng(5), 12)\n"
        "save_batch(pack(s, np.arange(12.0), np.ones(12), seed=3, row_length=64), sys.argv[1])\n"
    )
    for hashseed, name in (("1", "a"), ("2", "b")):
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)],
            check=True,
            env={"PYTHONHASHSEED": hashseed, "PYTHONPATH": python_path()},
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def sampled(
    name: str, prompt: list[int], reply: list[int], logprob: float = -1.0, temperature: float = 1.0
) -> TokenSequence:
    mask = np.array([False] * len(prompt) + [True] * len(reply))
    return TokenSequence(
        name,
        np.array(prompt + reply, dtype=np.int32),
        mask,
        np.where(mask, np.float32(logprob), np.float32(np.nan)),
        np.where(mask, np.float32(temperature), np.float32(1)),
    )


def computed(*sequences: TokenSequence) -> int:
    batch = packed(list(sequences), row_length=100)
    validate(batch)
    return int((batch.nodes_RS >= 0).sum())


def test_what_may_be_shared():
    alone = sampled("a", [1, 2, 3], [4, 5])
    assert computed(alone, sampled("b", [1, 2, 3], [6, 7])) == 7  # the prompt
    assert computed(alone, sampled("b", [1, 2, 3], [4, 6])) == 6  # and an equal sampled token
    assert computed(alone, sampled("b", [1, 2, 3], [4, 5])) == 5  # two equal samples
    assert computed(alone, sampled("b", [1, 2, 3, 4, 5, 8], [9])) == 7  # what one sampled is the other's history
    assert computed(alone, sampled("b", [1, 2, 3], [4, 5], logprob=-1.5)) == 7  # sampled at another logprob
    assert computed(alone, sampled("b", [1, 2, 3], [4, 5], temperature=0.5)) == 7  # at another temperature
    assert computed(alone, sampled("b", [2, 2, 3], [4, 5])) == 10


def test_history_follows_the_reply_that_it_repeats():
    """Two replies start alike, with other log-probabilities; a third sequence has the longer one as history."""
    short, long = sampled("a", [1, 2, 3], [4, 9], logprob=-2.0), sampled("b", [1, 2, 3], [4, 5, 6])
    history = sampled("c", [1, 2, 3, 4, 5, 6], [7])
    assert computed(short, long, history) == computed(long, short, history) == 3 + 2 + 3 + 1


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), max_size=60), capacity=st.integers(9, 30))
def test_best_fit_is_that_of_one_part_after_the_other(sizes, capacity):
    sizes.sort(reverse=True)
    bins: list[list[int]] = []
    for part, size in enumerate(sizes):
        free = [capacity - sum(sizes[member] for member in members) for members in bins]
        room = [(left, number) for number, left in enumerate(free) if left >= size]
        if not room:
            bins.append([])
        bins[min(room)[1] if room else -1].append(part)
    assert best_fit(sizes, capacity) == bins


@pytest.mark.parametrize("weights", [1, 2, 4])
def test_hashes_that_collide_share_nothing_wrong(monkeypatch, weights):
    sequences = random_sequences(np.random.default_rng(3), 20, vocabulary=3)
    expected = packed(sequences, 7)
    draw, calls = np.random.default_rng, []

    def colliding(seed: int) -> np.random.Generator | SimpleNamespace:
        calls.append(seed)
        weak = SimpleNamespace(integers=lambda *_, size, dtype: draw(seed).integers(weights, size=size, dtype=dtype))
        return weak if seed == 0 else draw(seed)

    monkeypatch.setattr(np.random, "default_rng", colliding)
    batch = packed(sequences, 7)
    assert {0, 1} <= set(calls)
    np.testing.assert_array_equal(batch.tokens_RS, expected.tokens_RS)
    np.testing.assert_array_equal(batch.nodes_RS, expected.nodes_RS)


def test_tokens_share_only_equal_routed_experts():
    def routed(name: str, first: int) -> TokenSequence:
        routed_experts = np.array([[[0, 1]], [[first, 3]], [[4, 5]]], dtype=np.uint8)
        return dataclasses.replace(
            sampled(name, [1, 2], [3]), experts_SLK=routed_experts, routed_S=np.array([True, True, False])
        )

    assert computed(routed("a", 2), routed("b", 2)) == 3
    assert computed(routed("a", 2), routed("b", 6)) == 5
    with pytest.raises(DataError, match="b has no routed experts"):
        packed([routed("a", 2), sampled("b", [1], [2])])


def test_owners_of_a_shared_token_keep_their_own_advantage():
    sequences = [sampled("a", [1, 2], [3, 4]), sampled("b", [1, 2], [3, 5])]
    batch = pack(sequences, np.array([2.0, -1.0]), np.array([1.0, 3.0]), row_length=16, multiple=1)
    row = scored_row(batch, 0)
    shared = int(np.flatnonzero(row.target_N == 3)[0])
    owners = row.sequence_P[row.token_P == shared]
    assert sorted(row.advantage_Q[owners]) == [-1.0, 2.0]
    index = row.index_N[shared]
    assert batch.weights_RS[0, index] == 4
    assert batch.advantages_RS[0, index] == pytest.approx((2 * 1 - 1 * 3) / 4)
    assert batch.tokens_RS[0, row.predictor_N].tolist() == [2, 3, 3]


def test_a_tree_larger_than_a_row_repeats_its_prefix():
    prompt = list(range(1, 11))
    sequences = [sampled(f"s{k}", prompt, [20 + k, 30 + k]) for k in range(6)]
    batch = packed(sequences, row_length=14, multiple=1)  # the prompt and two replies fit
    validate(batch)
    assert batch.rows == 3
    assert_same_sequences(sequences, flatten(batch))
    assert packing_metrics(batch)["padding_share"] == 0


def test_a_chain_of_many_nested_prefixes():
    tokens = np.arange(1100) % 7
    sequences = [scoring_sequence(f"s{n}", tokens[:n].tolist()) for n in range(2, 1100)]
    batch = packed(sequences, row_length=1100, multiple=1)
    assert batch.rows == 1
    assert int((batch.nodes_RS >= 0).sum()) == 1099


def test_over_length_is_never_silent():
    short, long = sampled("group 0, trajectory 0", [1], [2]), sampled("group 0, trajectory 1", [1, 2], [3, 4, 5])
    with pytest.raises(DataError, match=r"group 0, trajectory 1 has 5 tokens, a row holds 4"):
        fit([short, long], 4, "error")
    with pytest.raises(DataError, match="group 0, trajectory 1"):
        packed([short, long], row_length=4)
    cut = fit([short, long], 4, "truncate")
    assert cut.truncated == ("group 0, trajectory 1",)
    assert [len(sequence) for sequence in cut.sequences] == [2, 4]
    assert cut.sequences[1].scored == 2
    assert fit([short, long], 2, "truncate").dropped == ("group 0, trajectory 1",)  # nothing sampled would be left
    assert fit([short, long], 4, "drop").dropped == ("group 0, trajectory 1",)
    with pytest.raises(DataError, match="empty: all 1 sequences are longer"):
        fit([long], 4, "drop")


def test_bad_input_is_named():
    with pytest.raises(DataError, match="empty"):
        packed([])
    with pytest.raises(DataError, match="x: its first token carries loss"):
        packed([sampled("x", [], [1, 2])])
    with pytest.raises(DataError, match="y has no tokens"):
        packed([sampled("x", [1], [2]), sampled("y", [], [])])
    wide = dataclasses.replace(sampled("y", [1], [2]), tokens_S=np.array([1, 2], dtype=np.int64))
    with pytest.raises(ValueError, match="y: tokens_S must be 2 x int32"):
        packed([sampled("x", [1], [2]), wide])
    other = dataclasses.replace(sampled("y", [1], [2]), tokens_S=np.array([1, 2], dtype=np.float32))  # as many bytes
    with pytest.raises(ValueError, match="y: tokens_S must be 2 x int32"):
        packed([other, sampled("x", [1], [2])])
    with pytest.raises(DataError, match="too few for minibatches = 5"):
        packed([sampled("x", [1], [2])], row_length=64, minibatches=5)


def test_minibatches_all_have_work():
    sequences = [sampled(f"s{k}", [k, k + 1], [k] * 12) for k in range(10)]
    batch = packed(sequences, row_length=16, minibatches=3, data=2, multiple=1)
    validate(batch)
    assert batch.rows == 3 * 4
    for index in range(3):
        assert total_weight(batch, minibatch_rows(batch.rows, 3, index)) > 0
    rows = sorted(row for index in range(3) for row in minibatch_rows(batch.rows, 3, index))
    assert rows == list(range(batch.rows))


def test_scores_come_back_in_input_order():
    random = np.random.default_rng(1)
    sequences = [
        scoring_sequence(f"s{k}", random.integers(0, 4, size=int(random.integers(1, 9))).tolist()) for k in range(20)
    ]
    batch = packed(sequences, row_length=24)
    validate(batch, training=False)
    scores = unpack_scores(batch, batch.tokens_RS)  # "score" every token with its own id
    for sequence, score in zip(sequences, scores, strict=True):
        np.testing.assert_array_equal(score, sequence.tokens_S[1:])


FAULTS = {
    "nodes_RS disagrees": lambda b: {"nodes_RS": np.where(b.nodes_RS == 0, 1, b.nodes_RS).astype(np.int32)},
    "positions_RS": lambda b: {"positions_RS": b.positions_RS + np.int32(1)},
    "previous_RS": lambda b: {"previous_RS": np.maximum(b.previous_RS, 0).astype(np.int32)},
    "padding has a token id": lambda b: {"tokens_RS": np.where(b.nodes_RS < 0, 7, b.tokens_RS).astype(np.int32)},
    "weights_RS is not": lambda b: {"weights_RS": b.weights_RS * np.float32(2)},
    "advantages_RS is not": lambda b: {"advantages_RS": b.advantages_RS + b.loss_mask_RS.astype(np.float32)},
    "loss_mask_RS disagrees": lambda b: {"loss_mask_RS": np.zeros_like(b.loss_mask_RS)},
    "no sampling logprob": lambda b: {"logprobs_RS": np.full_like(b.logprobs_RS, np.nan)},
    "logprob is above 0": lambda b: {"logprobs_RS": -b.logprobs_RS},
    "temperature is not positive": lambda b: {"temperatures_RS": np.where(b.loss_mask_RS, 0, 1).astype(np.float32)},
    "advantage is not a number": lambda b: {"sequence_advantage_Q": b.sequence_advantage_Q * np.float32(np.nan)},
    "parent does not lie before it": lambda b: {"node_parent_M": np.arange(len(b.node_parent_M), dtype=np.int32)},
    "a node belongs to no sequence": lambda b: {"leaf_Q": np.zeros_like(b.leaf_Q)},
    "float64, not int32": lambda b: {"tokens_RS": b.tokens_RS.astype(np.float64)},
}


@pytest.mark.parametrize("message", FAULTS)
def test_validate_finds_planted_faults(message):
    batch = packed(random_sequences(np.random.default_rng(11), 6), row_length=64)
    validate(batch)
    with pytest.raises(DataError, match=message):
        validate(dataclasses.replace(batch, **FAULTS[message](batch)))


def test_files_of_another_kind_are_refused(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("no")
    with pytest.raises(DataError, match="not a packed batch"):
        load_batch(tmp_path / "text")
    with pytest.raises(DataError, match="not a packed batch"):
        load_batch(tmp_path / "missing")
    save_file({"tokens_RS": np.zeros((1, 2))}, tmp_path / "other")
    with pytest.raises(DataError, match="schema None"):
        load_batch(tmp_path / "other")
    with pytest.raises(OSError, match=r"can't be written: .*No such file"):
        save_batch(packed([scoring_sequence("one", [1, 2, 3])]), tmp_path / "nowhere" / "batch")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_b1_minibatches_never_lack_rows():
    """Lognormal replies, as of a model that rarely answers at length, with one that reaches the limit."""
    for seed in range(100):
        random = np.random.default_rng(seed)
        groups, minibatches, data = (4, 4, 1) if seed % 2 else (8, 8, 2)
        lengths = np.minimum(random.lognormal(np.log(90), 1, size=(groups, 8)).astype(int) + 1, 2000)
        lengths[0, 0] = 2000
        sequences = []
        for group in range(groups):
            prompt = random.integers(0, 50_000, 100).tolist()
            for reply in lengths[group]:
                sampled_ids = random.integers(0, 50_000, reply).tolist()
                sequences.append(sampled(f"{len(sequences)}", prompt, sampled_ids))
        batch = packed(sequences, seed, minibatches=minibatches, data=data)
        validate(batch)
        used_R = (batch.nodes_RS >= 0).any(axis=1).reshape(minibatches, -1)
        assert used_R.all() if batch.rows == minibatches * data else used_R.any(axis=1).all()
        assert [len(batch.path_index(q)) for q in range(len(sequences))] == [len(sequence) for sequence in sequences]


def test_b1_equal_sequences_spread_over_minibatches():
    sequences = [sampled(f"{number}", list(range(20)), [1, 2]) for number in range(4)]
    batch = packed(sequences, minibatches=4)
    validate(batch)
    assert sorted(batch.row_Q) == [0, 1, 2, 3]


def agents(groups: int, prompt: int, reply: int, common: int = 0) -> list[TokenSequence]:
    """Groups of eight replies to a prompt of `prompt` tokens, the first `common` of which all groups share."""
    random = np.random.default_rng(groups + prompt)
    head = random.integers(0, 50_000, common)
    sequences = []
    for group in range(groups):
        question = np.concatenate([head, random.integers(0, 50_000, prompt - common)])
        for index in range(8):
            tokens_S = np.concatenate([question, random.integers(0, 50_000, reply)]).astype(np.int32)
            mask_S = np.arange(len(tokens_S)) >= prompt
            logprobs_S = np.where(mask_S, -1.0, np.nan).astype(np.float32)
            sequences.append(
                TokenSequence(f"{group}, {index}", tokens_S, mask_S, logprobs_S, np.ones(len(tokens_S), np.float32))
            )
    return sequences


@pytest.mark.parametrize(
    ("prompt", "reply", "common"),
    [(2048, 1024, 0), (3000, 500, 0), (6000, 500, 0), (12_000, 1000, 0), (600, 100, 500), (100, 100, 0)],
)
def test_c1_default_rows_compute_a_shared_prompt_once(prompt, reply, common):
    sequences = agents(4, prompt, reply, common)
    unique = common + 4 * (prompt - common) + 32 * reply
    metrics = packing_metrics(packed(sequences))
    assert metrics["tokens_computed"] <= 1.02 * unique
    assert metrics["padding_share"] < 0.05


def test_c1_default_rows_stay_within_what_memory_carries():
    """A tree of 10,240 tokens in rows of at most 6,000 is cut; a sequence that is longer than the limit still gets its row."""
    metrics = packing_metrics(packed(agents(4, 2048, 1024), row_limit=6000))
    assert 4096 < metrics["row_length"] <= 6016
    assert metrics["tokens_computed"] > 4 * 10_240
    assert packing_metrics(packed(agents(4, 6000, 500), row_limit=4096))["row_length"] == 6528
