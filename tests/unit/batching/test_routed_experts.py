"""Routed experts: what the server used is what gets replayed, token by token, and every way to lose some is an error
with a name.

Shape suffixes: S tokens, L layers, K experts per token.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.chat_completion import Choice

from batch_check import flatten, validate
from lockstep.batching.pack import pack
from lockstep.batching.prefix_tree import scoring_sequence
from lockstep.batching.prepare import prepare
from lockstep.batching.routed_experts import RoutedExpertsShape
from lockstep.batching.tokenize import tokenize
from lockstep.config.train import TrainConfig
from lockstep.errors import DataError
from lockstep.rollouts.trajectory import TrajectoryGroup
from lockstep_wire.routed_experts import routed_experts_digest
from random_batches import choice, seeds, trajectory

SHAPE = RoutedExpertsShape(layers=3, top_k=2, experts=8)


def draw(random: np.random.Generator, tokens: int, shape: RoutedExpertsShape = SHAPE) -> np.ndarray:
    choices = [random.permutation(shape.experts)[: shape.top_k] for _ in range(tokens * shape.layers)]
    return (
        np.array(choices)
        .reshape(tokens, shape.layers, shape.top_k)
        .astype(np.uint8 if shape.experts <= 256 else np.uint16)
    )


def encode(rows: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return base64.b64encode(buffer.getvalue()).decode()


def routed(prompt: list[int], sampled: list[int], rows: np.ndarray, **changes) -> Choice:
    """A choice with the routed experts `rows`, whose digest the server made."""
    digest = routed_experts_digest(prompt, sampled, base64.b64decode(encode(rows)))
    return choice(prompt, sampled, **({"routed_experts": encode(rows), "routed_experts_digest": digest} | changes))


def sequence_of(made: Choice, shape: RoutedExpertsShape = SHAPE):
    (sequence,) = tokenize(trajectory(made), "m", 2, 5, shape).sequences
    return sequence


@pytest.mark.parametrize("shape", [SHAPE, RoutedExpertsShape(2, 4, 256), RoutedExpertsShape(1, 8, 512)])
@pytest.mark.parametrize("last", [False, True])
def test_routed_experts_land_on_their_tokens(shape, last):
    rows = draw(np.random.default_rng(0), 5 + last, shape)
    sequence = sequence_of(routed([1, 2, 3], [4, 5, 6], rows), shape)
    assert sequence.experts_SLK.dtype == rows.dtype
    np.testing.assert_array_equal(sequence.experts_SLK[: len(rows)], rows)
    assert sequence.routed_S.tolist() == [True] * 5 + [last]
    assert len(set(sequence.experts_SLK[5, 0].tolist())) == shape.top_k  # a stand-in that a router could have picked


@settings(max_examples=50, deadline=None)
@given(seed=seeds, turns=st.integers(1, 5))
def test_turns_hand_their_routed_experts_over(seed, turns):
    """A turn's prompt covers the last token of the turn before it, which had none. Earlier records win and are not
    counted twice.
    """
    random = np.random.default_rng(seed)
    history: list[int] = random.integers(9, size=int(random.integers(1, 5))).tolist()
    known = np.empty((0, SHAPE.layers, SHAPE.top_k), np.uint8)
    choices = []
    for _ in range(turns):
        reply = random.integers(9, size=int(random.integers(1, 5))).tolist()
        computed = len(history) + len(reply) - 1
        known = np.concatenate([known, draw(random, computed - len(known))])
        choices.append(routed(list(history), reply, known))
        history = [*history, *reply, *random.integers(9, size=int(random.integers(0, 3))).tolist()]
    result = tokenize(trajectory(*choices), "m", 0, 0, SHAPE)
    (sequence,) = result.sequences
    np.testing.assert_array_equal(sequence.experts_SLK[: len(known)], known)
    assert sequence.routed_S.tolist() == [True] * len(known) + [False]
    assert result.disagreeing == 0


def test_a_token_keeps_the_routed_experts_it_was_sampled_with():
    random = np.random.default_rng(1)
    first = draw(random, 3)
    second = draw(random, 6)
    second[:3] = first
    second[1] = (first[1] + 1) % SHAPE.experts
    result = tokenize(
        trajectory(routed([1, 2], [3, 4], first), routed([1, 2, 3, 4, 5, 6], [7], second)), "m", 0, 0, SHAPE
    )
    (sequence,) = result.sequences
    np.testing.assert_array_equal(sequence.experts_SLK[:3], first)
    np.testing.assert_array_equal(sequence.experts_SLK[3:6], second[3:])
    assert result.disagreeing == 1


ROWS = draw(np.random.default_rng(2), 6)
SWAPPED = ROWS[[0, 2, 1, 3, 4, 5]]
OTHER = draw(np.random.default_rng(3), 6)


def forged(rows: np.ndarray) -> dict[str, str]:
    """Routed experts as a broken server would send them: with a digest that fits."""
    return {
        "routed_experts": encode(rows),
        "routed_experts_digest": routed_experts_digest([1, 2, 3], [4, 5, 6, 7], base64.b64decode(encode(rows))),
    }


def changed(token: int, value: int, place: tuple[int, int] = (1, 0), dtype: type = np.uint8) -> np.ndarray:
    rows = ROWS.astype(dtype)
    rows[token][place] = value
    return rows


PLANTED = {
    "has no routed experts for tokens 0 to 5": {"routed_experts": None},
    "for 5 of 6 tokens: 1 are lost in tokens 0 to 5": forged(np.delete(ROWS, 2, axis=0)),
    "has 8 rows of routed experts for 6": forged(np.concatenate([ROWS, ROWS[:2]])),
    "rows were changed or moved": {"routed_experts": encode(SWAPPED)},
    "not the ones the server made for tokens 0 to 5": {"routed_experts": encode(OTHER)},
    "without their digest": {"routed_experts_digest": None},
    "token 3: expert 8 is out of range, a layer has 8": forged(changed(3, 8)),
    "token 4: expert -1 is out of range": forged(changed(4, -1, dtype=np.int32)),
    "token 2: a layer names the same expert twice": forged(changed(2, int(ROWS[2, 1, 1]))),
    "shape \\[6, 2, 2\\], the model has 3 layers with 2": forged(ROWS[:, :2]),
    "shape \\[6, 6\\]": forged(ROWS.reshape(6, 6)),
    "are not integers": forged(ROWS.astype(np.float32)),
    "are not base64": {"routed_experts": "no base64!"},
    "are not a .npy array": {"routed_experts": base64.b64encode(b"something").decode()},
}


@pytest.mark.parametrize("message", PLANTED)
def test_planted_faults_are_named(message):
    good = routed([1, 2, 3], [4, 5, 6, 7], ROWS)
    bad = type(good).model_validate(good.model_dump() | PLANTED[message])
    tokenize(trajectory(good, good), "m", 2, 5, SHAPE)
    with pytest.raises(DataError, match=message) as error:
        tokenize(trajectory(good, bad), "m", 2, 5, SHAPE)
    assert str(error.value).startswith("group 2, trajectory 5, choice 1")


def test_pickled_routed_experts_are_not_opened():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    with pytest.raises(DataError, match=r"not a \.npy array"):
        sequence_of(choice([1], [2], routed_experts=text, routed_experts_digest=""))


def test_one_siblings_missing_routed_experts_stop_the_batch():
    good = routed([1, 2], [3, 4], ROWS[:3])
    group = TrajectoryGroup(trajectories=[trajectory(good, reward=0.0), trajectory(choice([1, 2], [5, 6]), reward=1.0)])
    with pytest.raises(DataError, match=r"group 0, trajectory 1, choice 0 has no routed experts for tokens 0 to 2"):
        prepare([group], model_name="m", step=0, config=TrainConfig(), routed_experts=SHAPE)
    assert prepare([group], model_name="m", step=0, config=TrainConfig()).batch.experts_RSLK is None  # replay off


@settings(max_examples=40, deadline=None)
@given(seed=seeds, siblings=st.integers(2, 6), disagree=st.booleans(), tight=st.booleans())
def test_packed_routed_experts_are_each_siblings_own(seed, siblings, disagree, tight):
    """Equal prompts share a node; where a sibling's prompt was routed differently the tree splits, and each keeps its
    own.
    """
    random = np.random.default_rng(seed)
    prompt = random.integers(9, size=5).tolist()
    shared = draw(random, 5)
    trajectories, expected = [], []
    for number in range(siblings):
        reply = [100 + number, *random.integers(9, size=int(random.integers(0, 4))).tolist()]
        rows = np.concatenate([shared, draw(random, len(reply) - 1)])
        if disagree and number == siblings - 1:
            rows[2] = (rows[2] + 1) % SHAPE.experts
        trajectories.append(trajectory(routed(prompt, reply, rows), reward=float(number)))
        expected.append(rows)
    config = TrainConfig(row_length=64 if tight else None)
    prepared = prepare(
        [TrajectoryGroup(trajectories=trajectories)], model_name="m", step=0, config=config, routed_experts=SHAPE
    )
    validate(prepared.batch, experts=SHAPE.experts)
    for sequence, rows in zip(flatten(prepared.batch), expected, strict=True):
        np.testing.assert_array_equal(sequence.experts_SLK[: len(rows)], rows)
    share = prepared.metrics["routed_experts_differ_between_siblings"]
    assert (share > 0) == disagree
    replies = sum(len(rows) - 4 for rows in expected)
    assert prepared.metrics["tokens_computed"] <= 5 + replies + (3 if disagree else 0)


def test_wide_routed_experts_survive_packing():
    shape = RoutedExpertsShape(2, 8, 512)
    sequence = sequence_of(routed([1], [2, 3], draw(np.random.default_rng(4), 2, shape)), shape)
    batch = pack([sequence], np.ones(1), np.ones(1))
    assert batch.experts_RSLK.dtype == np.uint16
    validate(batch, experts=512)


@pytest.mark.parametrize("rows", [3, 4])
def test_routed_experts_of_sequences_that_are_only_scored(rows):
    sequence = scoring_sequence("a", [1, 2, 3, 4], ROWS[:rows])
    assert sequence.routed_S.tolist() == [True] * rows + [False] * (4 - rows)
    np.testing.assert_array_equal(sequence.experts_SLK[:rows], ROWS[:rows])
    validate(pack([sequence], np.ones(1), np.ones(1)), training=False, experts=SHAPE.experts)
    with pytest.raises(DataError, match="a has 2 rows of routed experts for 4 tokens"):
        scoring_sequence("a", [1, 2, 3, 4], ROWS[:2])


def test_a_choice_of_an_earlier_version_is_read():
    fields = routed([1, 2], [3, 4], ROWS[:3]).model_dump()
    fields["routes_digest"] = fields.pop("routed_experts_digest")
    assert sequence_of(Choice.model_validate(fields), SHAPE).experts_SLK[:3].tolist() == ROWS[:3].tolist()


def test_the_digest_is_over_ids_and_rows():
    npy = base64.b64decode(encode(ROWS))
    digest = routed_experts_digest([1, 200000, 3], [4], npy)
    assert digest == routed_experts_digest(np.array([1, 200000, 3]), np.array([4], np.int64), npy)
    assert digest != routed_experts_digest([1, 200000], [3, 4], npy)
    assert digest != routed_experts_digest([1, 200000, 3], [4], npy[:-1])
