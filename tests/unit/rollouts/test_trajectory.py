"""Trajectories keep what the server said, gathering loses nothing, and Parquet gives it all back."""

from __future__ import annotations

import asyncio
import base64
import gc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from lockstep.config import deadlines
from lockstep.errors import ConfigError, DataError, RolloutError, StoreError
from lockstep.rollouts.gather import gather_trajectory_groups
from lockstep.rollouts.parquet import read_parquet, write_parquet
from lockstep.rollouts.trajectory import RolloutFailure, Trajectory, TrajectoryGroup
from random_batches import choice, trajectory


def test_choices_keep_the_servers_extra_fields():
    with_extras = choice([1, 2], [3, 4], version="m@7", routed_experts="AAAA")
    kept = trajectory(with_extras).choices[0]
    assert kept is with_extras
    again = Trajectory.model_validate_json(trajectory(with_extras).model_dump_json()).choices[0]
    assert again == with_extras
    assert again.model_extra == with_extras.model_extra
    assert again.model_extra["weight_versions"] == [{"version": "m@7", "start": 0, "end": 2}]


def test_messages_turn_choices_into_assistant_messages():
    assert trajectory(choice([1], [2])).messages == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "2"},
    ]


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_must_be_finite(reward):
    with pytest.raises(DataError, match="reward is"):
        trajectory(choice([1], [2]), reward=reward)
    rewarded = trajectory(choice([1], [2]))
    with pytest.raises(DataError, match="reward is"):
        rewarded.reward = reward
    assert rewarded.reward == 1.0


def test_other_items_are_refused():
    with pytest.raises(DataError, match="holds a str"):
        Trajectory(messages_and_choices=["hello"], reward=0)
    with pytest.raises(DataError, match="without a role"):
        Trajectory(messages_and_choices=[{"content": "hello"}], reward=0)


def test_defaults_are_not_shared():
    first, other = trajectory(choice([1], [2])), trajectory(choice([1], [2]))
    first.metrics["x"] = 1
    first.metadata["y"] = "z"
    assert other.metrics == {}
    assert other.metadata == {}


async def rollout(reward: float, delay: float = 0.0) -> Trajectory:
    await asyncio.sleep(delay)
    return trajectory(choice([1], [2]), reward=reward)


async def failing(message: str, delay: float = 0.0) -> Trajectory:
    await asyncio.sleep(delay)
    raise ValueError(message)


async def test_groups_and_trajectories_keep_their_order():
    groups = await gather_trajectory_groups(
        [[rollout(0.0, 0.02), rollout(1.0)], (rollout(r) for r in (2.0, 3.0)), [trajectory(reward=4.0), rollout(5.0)]],
        progress=False,
    )
    assert [[member.reward for member in group.trajectories] for group in groups] == [[0, 1], [2, 3], [4, 5]]


async def test_rollouts_run_at_the_same_time():
    barrier = asyncio.Barrier(6)

    async def meet() -> Trajectory:
        await asyncio.wait_for(barrier.wait(), 60)
        return trajectory(reward=0.0)

    groups = await gather_trajectory_groups([[meet() for _ in range(3)] for _ in range(2)], progress=False)
    assert len(groups) == 2


async def test_an_awaitable_may_give_a_whole_group():
    async def whole_group() -> TrajectoryGroup:
        return TrajectoryGroup(trajectories=[await rollout(1.0), await rollout(2.0)], metadata={"task": 3})

    ready = TrajectoryGroup(trajectories=[trajectory(reward=9.0)])
    groups = await gather_trajectory_groups([whole_group(), [rollout(0.0)], ready], progress=False)
    assert groups[0].metadata == {"task": 3}
    assert [len(group.trajectories) for group in groups] == [2, 1, 1]
    assert groups[2] is ready


async def test_tolerated_failures_stay_with_their_group():
    groups = await gather_trajectory_groups(
        [[rollout(0.0), failing("first")], [failing("second", 0.01), rollout(1.0)]], max_exceptions=2, progress=False
    )
    assert [len(group.trajectories) for group in groups] == [1, 1]
    assert [(failure.type, failure.message) for group in groups for failure in group.exceptions] == [
        ("ValueError", "first"),
        ("ValueError", "second"),
    ]
    assert "raise ValueError(message)" in groups[0].exceptions[0].traceback


@pytest.mark.parametrize(
    ("allowed", "passes"), [(0, False), (1, False), (2, True), (0.25, False), (0.26, True), (0.5, True), (2.0, True)]
)
async def test_tolerance_is_a_count_or_a_fraction(allowed, passes):
    work = [[rollout(0.0), rollout(1.0)], [failing("a"), failing("b")]]
    if passes:
        assert len(await gather_trajectory_groups(work, max_exceptions=allowed, progress=False)) == 2
    else:
        with pytest.raises(RolloutError):
            await gather_trajectory_groups(work, max_exceptions=allowed, progress=False)


async def test_too_many_failures_name_the_first_and_keep_what_finished():
    ended = []

    async def slow() -> Trajectory:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")
        return trajectory(reward=0.0)

    with pytest.raises(
        RolloutError, match=r"1 of 5 rollouts failed, 0 tolerated.*group 1, rollout 0: ValueError: boom"
    ) as error:
        await gather_trajectory_groups(
            [[rollout(0.5), rollout(1.5)], [failing("boom", 0.05), rollout(2.5), slow()]], progress=False
        )
    assert [[member.reward for member in group.trajectories] for group in error.value.groups] == [[0.5, 1.5], [2.5]]
    assert error.value.groups[1].exceptions[0].message == "boom"
    assert ended == ["cancelled"]


async def test_what_is_no_trajectory_is_a_failure():
    async def nothing():
        return None

    with pytest.raises(
        RolloutError, match="group 0, rollout 1: TypeError: the rollout gave a NoneType, not a Trajectory"
    ):
        await gather_trajectory_groups([[rollout(0.0), nothing()]], progress=False)
    with pytest.raises(RolloutError, match="gave a str"):
        await gather_trajectory_groups([["oops"]], progress=False)
    with pytest.raises(RolloutError, match="group 0: TypeError: the rollout gave a Trajectory, not a TrajectoryGroup"):
        await gather_trajectory_groups([rollout(1.0)], progress=False)


async def test_a_nan_reward_names_its_rollout():
    with pytest.raises(RolloutError, match=r"group 0, rollout 1: DataError: reward is nan"):
        await gather_trajectory_groups([[rollout(0.0), rollout(float("nan"), 0.01)]], progress=False)


async def test_a_reply_in_place_of_its_choice_names_its_rollout():
    async def careless() -> Trajectory:
        wrong = trajectory(choice([1], [2]))
        wrong.messages_and_choices.append(choice([1], [2]).message)
        return wrong

    with pytest.raises(
        RolloutError, match="group 0, rollout 1: DataError: messages_and_choices holds a ChatCompletionM"
    ):
        await gather_trajectory_groups([[rollout(0.0), careless()]], progress=False)


async def test_cancelling_the_gather_cancels_its_rollouts():
    started, ended = asyncio.Event(), []

    async def slow() -> Trajectory:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(1)
        return trajectory(reward=0.0)

    task = asyncio.create_task(gather_trajectory_groups([[slow(), slow()]], progress=False))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [1, 1]


async def test_a_rollout_that_does_not_end_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(deadlines, "CANCEL_S", 0.2)
    let_go = asyncio.Event()

    async def stubborn() -> Trajectory:
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        return trajectory(reward=0.0)

    with pytest.warns(RuntimeWarning, match="1 rollouts go on"), pytest.raises(RolloutError, match="boom"):
        await asyncio.wait_for(gather_trajectory_groups([[stubborn(), failing("boom", 0.01)]], progress=False), 60)
    let_go.set()


async def test_no_coroutine_is_left_behind():
    gc.collect()  # what other tests left is not this one's
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # "coroutine was never awaited"
        with pytest.raises(ConfigError, match="max_exceptions"):
            await gather_trajectory_groups([[rollout(0.0)]], max_exceptions=-1, progress=False)
        with pytest.raises(RolloutError):
            await gather_trajectory_groups([["oops", rollout(0.0)]], progress=False)
        gc.collect()


async def test_after_each_may_replace_or_drop_a_group():
    async def judge(group: TrajectoryGroup) -> TrajectoryGroup | list[TrajectoryGroup]:
        await asyncio.sleep(0)
        if group.trajectories[0].reward == 0:
            return []
        group.trajectories[0].reward *= 10
        return group

    work = [[rollout(0.0)], [rollout(1.0)], [rollout(2.0)]]
    groups = await gather_trajectory_groups(work, after_each=judge, progress=False)
    assert [group.trajectories[0].reward for group in groups] == [10, 20]
    with pytest.raises(ConfigError, match="after_each must return"):
        await gather_trajectory_groups([[rollout(0.0)]], after_each=lambda group: None, progress=False)


routed_experts = base64.b64encode(np.random.default_rng(0).integers(0, 8, size=50, dtype=np.uint8).tobytes()).decode()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def groups(draw) -> TrajectoryGroup:
    trajectories = []
    for _ in range(draw(st.integers(0, 3))):
        items = [{"role": "user", "content": draw(st.text())}]
        for _ in range(draw(st.integers(0, 2))):
            sampled = draw(st.lists(st.integers(0, 250000), max_size=4))
            values = draw(st.lists(st.floats(-50, 0), min_size=len(sampled), max_size=len(sampled)))
            extra = draw(
                st.sampled_from(
                    [{}, {"routed_experts": routed_experts}, {"routed_experts": "not base64"}, {"other": [1]}]
                )
            )
            prompt = draw(st.lists(st.integers(0, 250000), max_size=5))
            openai_logprobs = draw(st.booleans())
            items.append(choice(prompt, sampled, logprobs=values, openai_logprobs=openai_logprobs, **extra))
            items.append({"role": "tool", "tool_call_id": "x", "content": draw(st.text())})
        trajectories.append(
            Trajectory(
                messages_and_choices=items,
                reward=draw(st.floats(allow_nan=False, allow_infinity=False)),
                tools=draw(st.sampled_from([None, [], [{"type": "function", "function": {"name": "f"}}]])),
                metrics=draw(st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=2)),
                metadata=draw(st.dictionaries(st.text(), json_values, max_size=2)),
            )
        )
    failures = [RolloutFailure(type="E", message=draw(st.text()), traceback="t")] * draw(st.integers(0, 2))
    return TrajectoryGroup(
        trajectories=trajectories,
        exceptions=failures,
        metadata=draw(st.dictionaries(st.text(), json_values, max_size=2)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(groups(), max_size=3))
def test_parquet_and_json_lose_nothing(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("parquet") / "deep" / "0003.parquet"
    write_parquet(path, some, step=3)
    assert read_parquet(path) == some
    assert [path.name for path in path.parent.iterdir()] == ["0003.parquet"]
    assert [TrajectoryGroup.model_validate_json(group.model_dump_json()) for group in some] == some


def test_routed_experts_are_stored_as_bytes(tmp_path):
    import pyarrow.parquet as pq

    write_parquet(
        tmp_path / "a", [TrajectoryGroup(trajectories=[trajectory(choice([1], [2], routed_experts=routed_experts))])], 0
    )
    (struct,) = pq.read_table(tmp_path / "a").column("choices").to_pylist()[0]
    assert struct["routed_experts"] == base64.b64decode(routed_experts)
    assert routed_experts not in struct["rest"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").write_text("no")
    for name in ("a", "missing"):
        with pytest.raises(StoreError, match="not a readable Parquet file"):
            read_parquet(tmp_path / name)


def test_the_clients_objects_inside_messages_are_kept_and_others_named(tmp_path):
    call = ChatCompletionMessageFunctionToolCall.model_validate(
        {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    )
    with_call = Trajectory(messages_and_choices=[{"role": "assistant", "tool_calls": [call]}], reward=0)
    write_parquet(tmp_path / "a", [TrajectoryGroup(trajectories=[with_call])], 0)
    (group,) = read_parquet(tmp_path / "a")
    assert group.trajectories[0].messages == [{"role": "assistant", "tool_calls": [call.model_dump()]}]
    with_call.messages_and_choices[0]["when"] = object()
    with pytest.raises(
        DataError, match="group 1, trajectory 0: messages_and_choices can't be written to Parquet: object is"
    ):
        write_parquet(tmp_path / "b", [TrajectoryGroup(trajectories=[]), TrajectoryGroup(trajectories=[with_call])], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_b7_numpy_scalars_are_numbers(tmp_path):
    """Environments compute with NumPy: a metric of its types once ended a run after all rollouts of the step."""
    rewarded = trajectory(choice([1], [2]), reward=np.float32(0.5))
    rewarded.metrics |= {"share": np.float32(0.25), "count": np.int64(3)}
    rewarded.metadata["seed"] = np.uint8(7)
    write_parquet(tmp_path / "a", [TrajectoryGroup(trajectories=[rewarded], metadata={"level": np.int32(2)})], 0)
    (group,) = read_parquet(tmp_path / "a")
    (kept,) = group.trajectories
    assert kept.reward == 0.5
    assert kept.metrics == {"share": 0.25, "count": 3}
    assert kept.metadata == {"seed": 7}
    assert group.metadata == {"level": 2}
    rewarded.metadata["bad"] = {1}
    with pytest.raises(DataError, match="metadata can't be written to Parquet: set is not JSON"):
        write_parquet(tmp_path / "b", [TrajectoryGroup(trajectories=[rewarded])], 0)


def test_m7_trajectories_that_are_missing_are_named(tmp_path):
    """A flipped bit in the footer's number of rows once gave a group without trajectories, without a word."""
    import pyarrow.parquet as pq

    said = [{"role": "user", "content": "x"}]
    group = TrajectoryGroup(trajectories=[Trajectory(messages_and_choices=said, reward=k) for k in range(3)])
    write_parquet(tmp_path / "a", [group], 0)
    pq.write_table(pq.read_table(tmp_path / "a").slice(0, 2), tmp_path / "a")
    with pytest.raises(StoreError, match="damaged: it has 2 trajectories, 3 were written"):
        read_parquet(tmp_path / "a")


def test_m7_no_flipped_bit_reads_back_different(tmp_path):
    """30 of 350 single flips once gave other trajectories, without a word."""
    random = np.random.default_rng()
    groups = [
        TrajectoryGroup(
            trajectories=[
                Trajectory(
                    messages_and_choices=[{"role": "user", "content": "é" * k}], reward=k / 3, metadata={"k": str(k)}
                )
                for k in range(4)
            ],
            metadata={"scenario": "s"},
        )
    ]
    path = tmp_path / "0000.parquet"
    write_parquet(path, groups, 0)
    content, refused = path.read_bytes(), 0
    for position, bit in zip(random.integers(0, len(content), 300), random.integers(0, 8, 300), strict=True):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(bit)
        path.write_bytes(bytes(damaged))
        try:
            assert read_parquet(path) == groups, (position, bit)
        except StoreError:
            refused += 1
    assert refused > 100
