"""Trajectories to sequences and batches: only what the server returned is used, and whatever is missing or wrong is
named.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_check import flatten, validate
from lockstep.batching.prepare import prepare
from lockstep.batching.tokenize import tokenize
from lockstep.config.train import TrainConfig
from lockstep.errors import DataError, StaleRolloutError
from lockstep.rollouts.trajectory import RolloutFailure, Trajectory, TrajectoryGroup
from random_batches import choice, seeds, trajectory


def test_turns_that_continue_each_other_are_one_sequence():
    first = choice([1, 2, 3], [4, 5], logprobs=[-0.1, -0.2], openai_logprobs=True)
    second = choice([1, 2, 3, 4, 5, 6, 7], [8], logprobs=[-0.3], sampling={"temperature": 0.5})
    result = tokenize(trajectory(first, second), "m", 0, 0)
    (sequence,) = result.sequences
    assert result.splits == 0
    assert sequence.tokens_S.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sequence.loss_mask_S.tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True]
    np.testing.assert_array_equal(
        sequence.logprobs_S, np.array([np.nan] * 3 + [-0.1, -0.2] + [np.nan] * 2 + [-0.3], np.float32)
    )
    assert sequence.temperatures_S.tolist() == [1.0] * 7 + [0.5]


def test_a_rewritten_history_starts_a_new_sequence_and_is_counted():
    """A chat template that drops thinking: the second prompt holds [4] where [9, 4] was sampled."""
    result = tokenize(trajectory(choice([1, 2], [9, 4]), choice([1, 2, 4, 5], [6])), "m", 2, 7)
    assert result.splits == 1
    assert [sequence.name for sequence in result.sequences] == [
        "group 2, trajectory 7, sequence 0",
        "group 2, trajectory 7, sequence 1",
    ]
    assert [sequence.tokens_S.tolist() for sequence in result.sequences] == [[1, 2, 9, 4], [1, 2, 4, 5, 6]]
    assert [sequence.loss_mask_S.tolist() for sequence in result.sequences] == [
        [False] * 2 + [True] * 2,
        [False] * 4 + [True],
    ]


def test_a_turn_finds_its_conversation_among_several():
    """A sub-agent's turn in between does not break the main conversation."""
    result = tokenize(trajectory(choice([1], [2]), choice([7], [8]), choice([1, 2, 3], [4])), "m", 0, 0)
    assert [sequence.tokens_S.tolist() for sequence in result.sequences] == [[1, 2, 3, 4], [7, 8]]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, turns=st.integers(1, 6))
def test_every_sampled_token_carries_loss_exactly_once(seed, turns):
    random = np.random.default_rng(seed)
    history, choices = [int(random.integers(9))], []
    for _ in range(turns):
        if random.random() < 0.3:
            history = history[: int(random.integers(1, len(history) + 1))]  # drift
        reply = random.integers(9, size=int(random.integers(1, 5))).tolist()
        logprobs = (-random.exponential(size=len(reply))).tolist()
        choices.append(choice(list(history), reply, logprobs=logprobs, openai_logprobs=bool(random.integers(2))))
        history = [*history, *reply, *random.integers(9, size=int(random.integers(0, 4))).tolist()]
    sequences = tokenize(trajectory(*choices), "m", 0, 0).sequences
    trained = [
        (t, p)
        for sequence in sequences
        for t, p in zip(sequence.tokens_S[sequence.loss_mask_S], sequence.logprobs_S[sequence.loss_mask_S], strict=True)
    ]
    sampled = [
        (token, np.float32(logprob))
        for sequence in choices
        for token, logprob in zip(sequence.model_extra["token_ids"], logprobs_of(sequence), strict=True)
    ]
    assert sorted(trained) == sorted(sampled)


def logprobs_of(made):
    """A choice's log-probabilities, in whichever form it has them."""
    return made.model_extra.get("sampled_logprobs") or [entry.logprob for entry in (made.logprobs or EMPTY).content]


EMPTY = SimpleNamespace(content=[])
FAULTS = {
    "no prompt_token_ids": {"prompt_token_ids": None},
    "no token_ids": {"token_ids": None},
    "empty prompt": {"prompt_token_ids": []},
    "has no logprobs": {"sampled_logprobs": None},
    "3 logprobs for 2": {"token_ids": [4, 5], "weight_versions": [{"version": "m@0", "start": 0, "end": 2}]},
    "does not say how it was sampled": {"sampling": None},
    "top_p = 0.9": {"sampling": {"temperature": 1.0, "top_p": 0.9}},
    "top_k = 20": {"sampling": {"temperature": 1.0, "top_k": 20}},
    "min_p = 0.1": {"sampling": {"temperature": 1.0, "min_p": 0.1}},
    "repetition_penalty = 1.1": {"sampling": {"temperature": 1.0, "repetition_penalty": 1.1}},
    "presence_penalty = 0.5": {"sampling": {"temperature": 1.0, "presence_penalty": 0.5}},
    "logit_bias = ": {"sampling": {"temperature": 1.0, "logit_bias": {"3": 5.0}}},
    "temperature = 0.0": {"sampling": {"temperature": 0.0}},
    "carries no weight version": {"weight_versions": []},
    "not by a version of m": {"weight_versions": [{"version": "other@0", "start": 0, "end": 3}]},
    "by 'm', not": {"weight_versions": [{"version": "m", "start": 0, "end": 3}]},
    "cover 2 of 3": {"weight_versions": [{"version": "m@0", "start": 0, "end": 2}]},
    "do not cover token 1": {
        "weight_versions": [{"version": "m@0", "start": 0, "end": 1}, {"version": "m@1", "start": 2, "end": 3}]
    },
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_choice_that_cannot_be_trained_on_is_named(message):
    good = choice([1, 2], [3, 4, 5])
    bad = type(good).model_validate(good.model_dump() | FAULTS[message])
    with pytest.raises(DataError, match=message) as error:
        tokenize(trajectory(good, bad), "m", 4, 1)
    assert "group 4, trajectory 1, choice 1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_a_logprob_that_is_none_is_named(value):
    with pytest.raises(DataError, match="group 0, trajectory 0, choice 0, token 1: sampling logprob"):
        tokenize(trajectory(choice([1], [2, 3], logprobs=[-0.1, value])), "m", 0, 0)


def test_neutral_sampling_settings_are_fine():
    settings = {"top_k": -1, "seed": None, "stop": [], "structured_outputs": None}
    assert len(tokenize(trajectory(choice([1], [2], sampling=settings)), "m", 0, 0).sequences) == 1


def test_a_trajectory_with_nothing_sampled_is_named():
    with pytest.raises(DataError, match="group 1, trajectory 2 has no choice"):
        tokenize(Trajectory(messages_and_choices=[{"role": "user", "content": "?"}], reward=0), "m", 1, 2)
    with pytest.raises(DataError, match="group 1, trajectory 2 has no sampled token"):
        tokenize(trajectory(choice([1], [], logprobs=[])), "m", 1, 2)


def group(*rewards: float, exceptions: int = 0, version: str = "m@0") -> TrajectoryGroup:
    return TrajectoryGroup(
        trajectories=[
            trajectory(choice([1, 2, 3], [4 + k, 5], version=version), reward=reward)
            for k, reward in enumerate(rewards)
        ],
        exceptions=[RolloutFailure(type="ValueError", message="x")] * exceptions,
    )


def ready(*groups: TrajectoryGroup, step: int = 0, **settings):
    return prepare(groups, model_name="m", step=step, config=TrainConfig(**settings))


def test_prepare_gives_a_valid_batch_and_its_metrics():
    pair = group(0.0, 1.0)
    pair.trajectories[0].metrics["turns"] = 3
    prepared = ready(pair, group(0.5, 0.5, 0.5), kl_coef=0.1)
    validate(prepared.batch)
    assert [sequence.name for sequence in flatten(prepared.batch)] == [
        *("group 0, trajectory 0", "group 0, trajectory 1"),
        *(f"group 1, trajectory {k}" for k in range(3)),
    ]
    assert prepared.batch.sequence_advantage_Q.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]
    assert prepared.metrics["reward"] == pytest.approx(0.5)
    assert prepared.metrics["groups_without_signal"] == 1
    assert prepared.metrics["tokens_sampled"] == 10
    assert prepared.metrics["rollout/turns"] == 3
    assert prepared.metrics["tokens_unpacked"] == 25


def test_weights_by_token_and_by_trajectory():
    long = trajectory(choice([1], [2, 3]), choice([9], [8, 7, 6]), reward=1.0)  # two sequences, five sampled tokens
    short = trajectory(choice([1], [2]), reward=0.0)
    both = TrajectoryGroup(trajectories=[long, short])
    assert ready(both).batch.sequence_weight_Q.tolist() == [1, 1, 1]
    weights = ready(both, token_normalization="sequence").batch.sequence_weight_Q
    np.testing.assert_allclose(weights, [0.2, 0.2, 1.0], rtol=1e-6)


def test_bad_batches_are_named():
    with pytest.raises(DataError, match="the batch is empty: there is no group"):
        ready()
    with pytest.raises(DataError, match="group 1 has 1 trajectory"):
        ready(group(0.0, 1.0), group(1.0))
    with pytest.raises(DataError, match="failed rollouts left each of its 1 groups"):
        ready(group(1.0, exceptions=3))
    skipped = ready(group(1.0, exceptions=3), group(0.0, 1.0))
    assert skipped.metrics["groups_skipped"] == 1
    assert skipped.metrics["rollouts_failed"] == 3
    assert skipped.batch.sequence_ids[0] == "group 1, trajectory 0"
    nan = group(0.0, 1.0)
    object.__setattr__(nan.trajectories[1], "reward", float("nan"))
    with pytest.raises(DataError, match="group 0, trajectory 1: reward"):
        ready(nan)
    with pytest.raises(DataError, match="group 0, trajectory 0 has 5 tokens, a row holds 4"):
        ready(group(0.0, 1.0), row_length=4)
    dropped = ready(group(0.0, 1.0), row_length=4, over_length="truncate")
    assert dropped.metrics["sequences_truncated"] == 2


def test_stale_and_foreign_versions_are_refused():
    with pytest.raises(StaleRolloutError, match=r"group 0, trajectory 0 was sampled by step 1, 2 steps before"):
        ready(group(0.0, 1.0, version="m@1"), step=3)
    assert ready(group(0.0, 1.0, version="m@1"), step=3, max_steps_off_policy=2).metrics["steps_off_policy"] == 2
    with pytest.raises(StaleRolloutError, match="sampled by step 4, but the model is at step 3"):
        ready(group(0.0, 1.0, version="m@4"), step=3)
    with pytest.raises(StaleRolloutError, match="'someone@3'"):
        ready(group(0.0, 1.0, version="someone@3"), step=3)


def test_what_was_appended_to_a_trajectory_is_looked_at():
    """A list can be appended to behind the validator's back: a whole reply, or its message, would otherwise not be trained on."""
    first, second = choice([1], [2]), choice([1, 2, 3], [4])
    grown = trajectory(first)
    grown.messages_and_choices.append(second.model_dump())  # a choice that went through JSON is a choice
    assert [(each.model_extra or {})["token_ids"] for each in grown.choices] == [[2], [4]]
    grown.messages_and_choices.append(second.message)
    with pytest.raises(DataError, match="group 3, trajectory 4: messages_and_choices holds a ChatCompletionMessage"):
        tokenize(grown, "m", 3, 4)
    with pytest.raises(DataError, match="holds a ChatCompletionMessage"):
        _ = grown.messages


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high"])
def test_a_metric_that_is_no_number_is_named(value):
    good, bad = trajectory(choice([1], [2])), trajectory(choice([1], [3]), reward=0.0)
    bad.metrics["length"] = value
    group = TrajectoryGroup(trajectories=[good, bad])
    with pytest.raises(DataError, match=r"group 0, trajectory 1: metrics\['length'\] is"):
        prepare([group], model_name="m", step=0, config=TrainConfig())
    good.metrics["length"], bad.metrics["length"] = 1, np.float32(2)  # pyright: ignore[reportArgumentType]
    assert prepare([group], model_name="m", step=0, config=TrainConfig()).metrics["rollout/length"] == 1.5


def test_temperatures_that_vllm_raises_are_refused():
    """vLLM samples with 0.01 and says 0.002: the trainer would divide by another number than the server did."""
    with pytest.raises(DataError, match=r"temperature = 0.002, which vLLM raises to 0.01"):
        tokenize(trajectory(choice([1], [2], sampling={"temperature": 0.002})), "m", 0, 0)
    assert tokenize(trajectory(choice([1], [2], sampling={"temperature": 0.01})), "m", 0, 0).sequences


def test_b3_lengths_of_replies_and_their_cuts_are_reported():
    """Four replies of 2, 3, 1 and 2 tokens in two trajectories; the server cut one of them."""
    cut = trajectory(choice([1], [2, 3]), choice([1, 2, 3, 4], [5, 6, 7], finish_reason="length"), reward=1.0)
    full = trajectory(choice([1], [8]), choice([1, 8, 9], [4, 2]), reward=0.0)
    metrics = ready(TrajectoryGroup(trajectories=[cut, full])).metrics
    assert metrics["reply_tokens_mean"] == 2.0
    assert metrics["reply_tokens_max"] == 3.0
    assert metrics["replies_truncated"] == 0.25
    assert metrics["turns_mean"] == 2.0
    assert metrics["trajectories_masked"] == 0.0


def test_b3_masked_replies_count_in_the_baseline_and_carry_no_loss():
    """Rewards 0, 1, 5: without the truncated 5 the baseline would be 0.5."""
    cut = trajectory(choice([1], [6, 7], finish_reason="length"), reward=5.0)
    short, long = trajectory(choice([1], [2]), reward=0.0), trajectory(choice([1], [3, 4]), reward=1.0)
    group = TrajectoryGroup(trajectories=[short, cut, long])
    every = ready(group, advantage="dr_grpo")
    masked = ready(group, advantage="dr_grpo", mask_truncated=True)
    assert every.batch.sequence_advantage_Q.tolist() == [-2.0, 3.0, -1.0]
    assert masked.batch.sequence_ids == ("group 0, trajectory 0", "group 0, trajectory 2")
    assert masked.batch.sequence_advantage_Q.tolist() == [-2.0, -1.0]
    assert (masked.metrics["trajectories_masked"], masked.metrics["tokens_sampled"]) == (1.0, 3.0)
    assert masked.metrics["reward"] == 2.0
    assert not np.isin(masked.batch.tokens_RS, (6, 7)).any()
    with pytest.raises(DataError, match="each of its 2 trajectories has a truncated reply"):
        ready(TrajectoryGroup(trajectories=[cut, cut]), mask_truncated=True)


@pytest.mark.parametrize(
    ("prompt", "sampled", "token"),
    [([1, -1], [2], -1), ([1], [2, 40], 40), ([1], [10**6], 10**6), ([10**12], [1], 10**12)],
)
def test_m11_an_id_that_the_model_does_not_have_is_named(prompt, sampled, token):
    groups = [
        TrajectoryGroup(
            trajectories=[trajectory(choice([1], [2]), reward=0.0), trajectory(choice(prompt, sampled), reward=1.0)]
        )
    ]
    config = TrainConfig(learning_rate=1e-3)
    with pytest.raises(
        DataError, match=f"group 0, trajectory 1, choice 0: token id {token} is not one of the model's 40"
    ):
        prepare(groups, model_name="m", step=0, config=config, vocabulary=40)
