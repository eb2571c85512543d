"""The server's most likely ids on their way from the choice to the engine's scored pairs.

Shape suffixes: N tokens, C most likely ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_check import validate
from lockstep.batching.pack import load_batch, save_batch
from lockstep.batching.packed_batch import scored_row
from lockstep.batching.prepare import prepare
from lockstep.batching.top_logprobs import TOP, hits, top_ids
from lockstep.config.train import TrainConfig
from lockstep.rollouts.trajectory import TrajectoryGroup
from random_batches import choice, seeds, trajectory

VOCABULARY = 60


def served(random: np.random.Generator, prompt: list[int], count: int, form: str = "token_id:{}", most: int = TOP):
    """A choice of a server that was asked for `most` tokens, and what is to be read from it: ids by rank, -1 where it can't be known."""
    logprobs_NV = np.log(random.dirichlet(np.ones(VOCABULARY), count))
    order_NV = np.argsort(-logprobs_NV, axis=1)
    ranks = random.integers(0, 2 * TOP, count)
    sampled = order_NV[np.arange(count), ranks].tolist()
    content: list[dict[str, Any]] = []
    known = order_NV[:, :TOP].copy()
    for token, row, order in zip(sampled, logprobs_NV, order_NV, strict=True):
        listed = list(dict.fromkeys([token, *order[:most].tolist()]))[:most]  # vLLM's order, and its cut
        entries = [
            {"token": form.format(token_id), "logprob": float(row[token_id]), "bytes": []} for token_id in listed
        ]
        content.append(entries[0] | {"token": form.format(token), "top_logprobs": entries})
    known[ranks >= TOP - 1, -1] = -1
    made = choice(prompt, sampled, logprobs=[entry["logprob"] for entry in content], openai_logprobs=True)
    fields = made.model_dump()
    fields["logprobs"]["content"] = content
    return type(made).model_validate(fields), known


@settings(max_examples=25, deadline=None)
@given(seed=seeds, count=st.integers(1, 9))
def test_what_the_server_lists_is_what_is_read(seed, count):
    made, known_NC = served(np.random.default_rng(seed), [1, 2], count)
    found_NC = top_ids(made)
    assert found_NC is not None
    assert found_NC.dtype == np.int32
    np.testing.assert_array_equal(found_NC, known_NC)


@pytest.mark.parametrize(("form", "most"), [("t{}", TOP), ("token_id:{}", TOP - 1), ("token_id:{}", 0)])
def test_text_and_shorter_lists_say_nothing(form, most):
    random = np.random.default_rng()
    made, _ = served(random, [1, 2], 5, form, max(most, 1))
    if not most:
        made, _ = choice([1, 2], [3, 4]), None
    assert top_ids(made) is None


@settings(max_examples=25, deadline=None)
@given(seed=seeds, tight=st.booleans())
def test_every_scored_pair_has_its_own_ids(seed, tight, tmp_path_factory):
    """Through turns, siblings, packing and the file; rollouts without any among them."""
    random = np.random.default_rng(seed)
    trajectories, expected = [], []
    for number in range(4):
        first, known = served(random, [1, 2], int(random.integers(1, 4)))
        prompt = [1, 2, *(first.model_extra or {})["token_ids"], 7]
        plain = random.random() < 0.4
        second, more = served(random, prompt, int(random.integers(1, 4)), "t{}" if plain else "token_id:{}")
        trajectories.append(trajectory(first, second, reward=float(number)))
        expected.append(np.concatenate([known, np.full_like(more, -1) if plain else more]))
    config = TrainConfig(row_length=64 if tight else None)
    batch = prepare([TrajectoryGroup(trajectories=trajectories)], model_name="m", step=0, config=config).batch
    validate(batch)
    path = tmp_path_factory.mktemp("batch") / "batch.safetensors"
    save_batch(batch, path)
    batch, ids = load_batch(path), {}
    for row in range(batch.rows):
        scored = scored_row(batch, row)
        assert scored.top_PC is not None
        for number, name in enumerate(scored.names_Q):
            ids[name] = scored.top_PC[scored.sequence_P == number]
    assert len(ids) == 4
    for number, wanted in enumerate(expected):
        np.testing.assert_array_equal(ids[f"group 0, trajectory {number}"], wanted)


def test_hits_closed_form():
    trainer = np.arange(40).reshape(2, TOP)
    server = trainer.copy()
    assert hits(server, trainer) == (2.0, 2.0)
    server[0] = np.roll(server[0], 1)  # another first one, the same set
    server[1, 4:8] = [100, 101, 102, -1]  # three others; one not known
    assert hits(server, trainer) == pytest.approx((1.0, 1 + 16 / 19))
    assert hits(server[:0], trainer[:0]) == (0.0, 0.0)
