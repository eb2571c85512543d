"""Rewards of single turns: what a turn earned, what it is compared with, and that each token is trained once."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.batching.prepare import prepare
from lockstep.batching.turns import returns_of
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError, DataError
from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup
from random_batches import choice


def conversation(replies: list[list[int]], reward: float, turn_rewards: list[float] | None = None) -> Trajectory:
    """Turns that continue each other, with one new token of context before each reply."""
    items, ids = [], [1]
    for reply in replies:
        ids = [*ids, 2]
        items += [{"role": "user", "content": "?"}, choice(list(ids), reply, logprobs=[-0.5] * len(reply))]
        ids += reply
    return Trajectory(messages_and_choices=items, reward=reward, turn_rewards=turn_rewards)


GROUP = TrajectoryGroup(
    trajectories=[
        conversation([[5, 6], [7], [8, 9, 10]], 1.0, [0.0, 1.0, 3.0]),
        conversation([[5, 6], [11, 12]], 0.0, [2.0, -1.0]),
    ]
)


def trained(group: TrajectoryGroup, **settings) -> dict[tuple[int, ...], float]:
    """The advantage of each token, by all tokens up to it. Fails where a token would be trained twice."""
    config = TrainConfig(advantage="dr_grpo", loss="ppo", **settings)
    batch = prepare([group], model_name="m", step=0, config=config).batch
    given: dict[tuple[int, ...], float] = {}
    for number in range(len(batch.sequence_ids)):
        path = batch.path_index(number)
        row = batch.row_Q[number]
        tokens = batch.tokens_RS[row, path].tolist()
        for place, index in enumerate(path):
            if batch.loss_mask_RS[row, index]:
                given[tuple(tokens[: place + 1])] = float(batch.advantages_RS[row, index])
    return given


def test_returns_are_discounted_towards_the_beginning():
    assert returns_of([1.0, 0.0, 4.0], 0.5) == [2.0, 2.0, 4.0]
    assert returns_of([1.0, 2.0], 0.0) == [1.0, 2.0]
    assert returns_of([0.0, 0.0, 1.0], 1.0) == [1.0] * 3


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_each_turn_has_its_own_advantage(discount):
    given = trained(GROUP, advantage_per="turn", discount=discount)
    first, second = (np.array(returns_of(each.turn_rewards, discount)) for each in GROUP.trajectories)
    mean = np.concatenate([first, second]).mean()
    conversations = [([[5, 6], [7], [8, 9, 10]], first - mean), ([[5, 6], [11, 12]], second - mean)]
    expected: dict[tuple[int, ...], list[float]] = {}
    for replies, advantages in conversations:
        ids: list[int] = [1]
        for reply, advantage in zip(replies, advantages, strict=True):
            ids = [*ids, 2]
            for token in reply:
                ids = [*ids, token]
                expected.setdefault(tuple(ids), []).append(advantage)
    assert given.keys() == expected.keys()
    for tokens, advantages in expected.items():  # siblings that sampled the same first reply share its tokens
        assert given[tokens] == pytest.approx(np.mean(advantages), abs=1e-6), tokens


def test_a_reward_without_turns_is_the_last_turns_own():
    group = TrajectoryGroup(trajectories=[conversation([[5], [6]], 1.0), conversation([[7], [8]], 0.0)])
    given = trained(group, advantage_per="turn", discount=0.5)
    assert given[1, 2, 5] == pytest.approx(0.5 - 1.5 / 4)
    assert given[1, 2, 5, 2, 6] == pytest.approx(1 - 1.5 / 4)


@pytest.mark.parametrize("weighs", ["token", "sequence"])
def test_equal_advantages_make_the_batch_of_whole_trajectories(weighs):
    """Turns that all earned the same: every token has the weight and advantage that it has without turns."""
    rewards = [1.0, 0.0]
    group = TrajectoryGroup(
        trajectories=[conversation([[5 + n, 9], [7, 8, 6]], reward) for n, reward in enumerate(rewards)]
    )
    unsplit, turns = (
        prepare(
            [group],
            model_name="m",
            step=0,
            config=TrainConfig(advantage="dr_grpo", loss="ppo", token_normalization=weighs, advantage_per=per),
        ).batch
        for per in ("trajectory", "turn")
    )
    assert (unsplit.loss_mask_RS.sum(), unsplit.weights_RS.sum()) == (turns.loss_mask_RS.sum(), turns.weights_RS.sum())
    key = ("tokens_RS", "positions_RS", "weights_RS", "advantages_RS", "logprobs_RS", "temperatures_RS")
    masked = [
        sorted(zip(*(getattr(batch, name)[batch.loss_mask_RS].tolist() for name in key), strict=True))
        for batch in (unsplit, turns)
    ]
    assert masked[0] == masked[1]
    assert (turns.nodes_RS >= 0).sum() == (unsplit.nodes_RS >= 0).sum()  # what turns share is computed once


def test_what_has_no_effect_or_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="has no effect with advantage_per = trajectory"):
        TrainConfig(discount=0.5)
    short = TrajectoryGroup(trajectories=[conversation([[5], [6]], 1.0, [1.0]), *GROUP.trajectories])
    with pytest.raises(DataError, match="turn_rewards has 1 numbers for 2 choices"):
        trained(short, advantage_per="turn")
    with pytest.raises(DataError, match=r"turn_rewards\[1\] is nan"):
        conversation([[5], [6]], 1.0, [1.0, float("nan")])
    with pytest.raises(DataError, match="at least 2"):
        trained(TrajectoryGroup(trajectories=GROUP.trajectories[:1]), advantage_per="turn")
