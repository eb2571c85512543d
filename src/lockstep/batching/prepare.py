"""From groups of trajectories to a PackedBatch and the metrics of its data: the whole tokens side
in one call.

Shape suffixes: Q sequences, P pairs (sequence, token that carries its loss), C most likely ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lockstep.batching.advantages import advantages
from lockstep.batching.pack import MOST_ROW_LENGTH, Fitted, fit, pack, packing_metrics
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.batching.routed_experts import RoutedExpertsShape, prefix_disagreement
from lockstep.batching.select import Selected, select
from lockstep.batching.tokenize import MOST_IDS, Tokenized
from lockstep.batching.top_logprobs import TOP
from lockstep.batching.turns import by_turn, returns_of
from lockstep.errors import DataError

if TYPE_CHECKING:
    from lockstep.config.train import TrainConfig
    from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Prepared:
    """A batch ready for the engine, and metrics of the rollouts and of packing.

    sequences: all that fit.
    packed: those of them that are in the batch, in its order.
    """

    batch: PackedBatch
    metrics: dict[str, float]
    sequences: list[TokenSequence]
    packed: list[TokenSequence]


def _weights(config: TrainConfig, scored_Q: np.ndarray, owner_Q: np.ndarray) -> np.ndarray:
    """Weight of one scored token of each sequence. `owner_Q` numbers the trajectory a sequence
    belongs to.
    """
    if config.weighs_by != "sequence":
        return np.ones(len(scored_Q))
    return 1 / np.bincount(owner_Q, weights=scored_Q)[owner_Q]


def _divisor(config: TrainConfig, owner_Q: np.ndarray) -> np.ndarray | None:
    """float64 `[1]`: trajectories times the constant length; None where a loss is divided by its
    tokens' weight.
    """
    if config.constant_length is None:
        return None
    return np.array([float(len(np.unique(owner_Q)) * config.constant_length)])


def prepare(
    groups: Sequence[TrajectoryGroup],
    *,
    model_name: str,
    step: int,
    config: TrainConfig,
    data: int = 1,
    multiple: int = 64,
    routed_experts: RoutedExpertsShape | None = None,
    row_limit: int = MOST_ROW_LENGTH,
    vocabulary: int = MOST_IDS,
) -> Prepared:
    """Check, tokenize and pack what step `step` of `model_name` is to be trained on.

    data: data-parallel size; the number of rows is a multiple of it (times config.minibatches).
    multiple: of the row length; row_limit: its largest value where config.row_length is None.
    vocabulary: how many token ids the model has.

    Unusable trajectories are left out and counted, and so are groups with fewer than two others.

    Raises DataError or StaleRolloutError, naming group, trajectory and choice: at once for missing
    ids, logprobs, versions or experts; for the causes in `select` beyond config.max_dropped.
    """
    selected = select(groups, model_name, step, config, routed_experts, vocabulary)
    per_turn = config.advantage_per == "turn"
    tokenized = [by_turn(each.tokenized) if per_turn else each.tokenized for each in selected.usable]
    advantage = _advantages(selected, config)
    owners = {
        (rollout.sequences[0].group, rollout.sequences[0].trajectory): number
        for number, rollout in enumerate(tokenized)
    }
    unmasked = _unmasked(tokenized) if config.mask_truncated else tokenized
    every = [sequence for rollout in unmasked for sequence in rollout.sequences]
    fitted = fit(every, config.row_length, config.over_length)
    owner_Q = np.array([owners[sequence.group, sequence.trajectory] for sequence in fitted.sequences])
    scored_Q = np.array([sequence.scored for sequence in fitted.sequences])
    advantage_Q = np.array([advantage[each.group, each.trajectory, each.turn] for each in fitted.sequences])
    weight_Q = _weights(config, scored_Q, owner_Q)
    trained_Q = _trained(config, advantage_Q, np.array([sequence.group for sequence in fitted.sequences]))
    sequences = [sequence for sequence, trained in zip(fitted.sequences, trained_Q, strict=True) if trained]
    batch = pack(
        sequences,
        advantage_Q[trained_Q],
        weight_Q[trained_Q],
        row_length=config.row_length,
        seed=config.seed + step,
        share_prefixes=config.share_prefixes,
        minibatches=config.minibatches,
        data=data,
        multiple=multiple,
        row_limit=row_limit,
    )
    left_out = np.array([(weight_Q * scored_Q)[~trained_Q].sum()])
    extra = {"unpacked_weight": left_out, "divisor": _divisor(config, owner_Q), "top_PC": _top(sequences)}
    batch = replace(batch, current_RS=_current(batch, sequences, step), **extra)
    metrics = _rollout_metrics(selected, groups, tokenized, step) | _reply_metrics(tokenized, unmasked, config)
    metrics |= _without_signal(selected, advantage) | _sequence_metrics(fitted, trained_Q)
    if routed_experts is not None:
        metrics |= _route_metrics(tokenized, sequences)
    return Prepared(batch, metrics | packing_metrics(batch), fitted.sequences, sequences)


Advantages = dict[tuple[int, int, int], float]
"""By group, trajectory, and turn; -1 for all turns."""


def _advantages(selected: Selected, config: TrainConfig) -> Advantages:
    """One for each usable trajectory or for each of its turns, group by group."""
    rewards = [
        [usable.trajectory.reward - overlong_penalty(usable.tokenized, config) for usable in group]
        for group in selected.groups.values()
    ]
    names = [f"group {number}" for number in selected.groups]
    given = advantages(rewards, config.policy_advantage, names, config.reward_eps).tolist()
    if config.advantage_per == "turn":  # the groups were checked above
        return _turn_advantages(selected, config)
    first = [usable.tokenized.sequences[0] for usable in selected.usable]
    return {(sequence.group, sequence.trajectory, -1): value for sequence, value in zip(first, given, strict=True)}


def _turn_advantages(selected: Selected, config: TrainConfig) -> Advantages:
    """One for each turn that sampled a token. All turns of a group are compared with each other."""
    keys: list[tuple[int, int, int]] = []
    returns: list[list[float]] = []
    for group in selected.groups.values():
        returns.append([])
        for usable in group:
            rewards = usable.trajectory.rewards_by_turn()
            rewards[-1] -= overlong_penalty(usable.tokenized, config)
            earned, first = returns_of(rewards, config.discount), usable.tokenized.sequences[0]
            for turn in usable.tokenized.turns:
                keys.append((first.group, first.trajectory, turn.number))
                returns[-1].append(earned[turn.number])
    names = [f"group {number}" for number in selected.groups]
    given = advantages(returns, config.policy_advantage, names, config.reward_eps).tolist()
    return dict(zip(keys, given, strict=True))


def overlong_penalty(rollout: Tokenized, config: TrainConfig) -> float:
    """The reward that a trajectory loses for its length: nothing up to `overlong_tokens -
    overlong_buffer` sampled tokens, all of the penalty from `overlong_tokens` on, linear between
    (arXiv 2503.14476, equation 13).
    """
    if config.overlong_tokens is None or config.overlong_buffer is None:
        return 0.0
    beyond = sum(rollout.replies) - (config.overlong_tokens - config.overlong_buffer)
    return config.overlong_penalty * min(max(beyond / config.overlong_buffer, 0.0), 1.0)


def _unmasked(tokenized: list[Tokenized]) -> list[Tokenized]:
    """Trajectories without a truncated reply. The others count in their group's baseline only.
    Raises DataError if there are none.
    """
    unmasked = [rollout for rollout in tokenized if not rollout.truncated]
    if not unmasked:
        raise DataError(
            f"the batch is empty: each of its {len(tokenized)} trajectories has a truncated reply, and mask_truncated leaves these out: "
            "let the rollouts sample more tokens (max_tokens, max_model_len), or set mask_truncated = false"
        )
    return unmasked


def _trained(config: TrainConfig, advantage_Q: np.ndarray, group_Q: np.ndarray) -> np.ndarray:
    """bool `[Q]`: sequences to compute. Without a KL penalty or entropy bonus those of a group
    without signal add exactly nothing to the gradient.

    They still count in the loss's normalisation, so leaving them out changes no update. TRL and
    verl compute them. All stay where too few would be left for the minibatches; the trainer then
    finds out which have no signal.
    """
    every_Q = np.ones(len(advantage_Q), dtype=bool)
    if config.trains_without_signal:
        return every_Q
    trained_Q = np.isin(group_Q, group_Q[advantage_Q != 0])
    return trained_Q if trained_Q.sum() >= config.minibatches else every_Q


def _current(batch: PackedBatch, sequences: list[TokenSequence], step: int) -> np.ndarray:
    """bool `[R, S]`: tokens that step `step` sampled, in any of the sequences that own them."""
    current_RS = np.zeros(batch.tokens_RS.shape, dtype=bool)
    row_Q = batch.row_Q
    for number, sequence in enumerate(sequences):
        current_RS[row_Q[number], batch.path_index(number)] |= sequence.steps_S == step
    return current_RS


def _top(sequences: list[TokenSequence]) -> np.ndarray | None:
    """int32 `[P, C]`: the server's most likely ids at each scored token, sequence by sequence; None
    if no rollout has any.
    """
    if all(sequence.top_SC is None for sequence in sequences):
        return None
    unknown = np.full((1, TOP), -1, dtype=np.int32)
    return np.concatenate(
        [
            np.repeat(unknown, sequence.scored, 0) if sequence.top_SC is None else sequence.top_SC[sequence.loss_mask_S]
            for sequence in sequences
        ]
    )


def _route_metrics(tokenized: list[Tokenized], sequences: list[TokenSequence]) -> dict[str, float]:
    """Tokens for which turns recorded different experts, and the share of shared-prefix tokens
    where siblings did.
    """
    compared, differing = prefix_disagreement(sequences)
    return {
        "routed_experts_differ_between_turns": float(sum(rollout.disagreeing for rollout in tokenized)),
        "routed_experts_differ_between_siblings": differing / compared if compared else 0.0,
    }


def _without_signal(selected: Selected, given: Advantages) -> dict[str, float]:
    """The number of groups whose rewards are all equal, and which so have no gradient."""
    with_signal = {group for (group, _, _), advantage in given.items() if advantage}
    return {"groups_without_signal": float(len(selected.groups) - len(with_signal))}


def _rollout_metrics(
    selected: Selected, groups: Sequence[TrajectoryGroup], tokenized: list[Tokenized], step: int
) -> dict[str, float]:
    trajectories = [usable.trajectory for usable in selected.usable]
    rewards = np.array([trajectory.reward for trajectory in trajectories])
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "groups": float(len(selected.groups)),
        "groups_skipped": float(selected.skipped),
        "trajectories": float(len(trajectories)),
        "rollouts_failed": float(sum(len(group.exceptions) for group in groups)),
        "turns_split": float(sum(rollout.splits for rollout in tokenized)),
        "steps_off_policy": float(max(step - min(rollout.steps) for rollout in tokenized)),
    }
    return metrics | selected.dropped_metrics() | _means(trajectories)


def _sequence_metrics(fitted: Fitted, trained_Q: np.ndarray) -> dict[str, float]:
    return {
        "sequences_truncated": float(len(fitted.truncated)),
        "sequences_dropped": float(len(fitted.dropped)),
        "sequences_not_computed": float((~trained_Q).sum()),
    }


def _reply_metrics(tokenized: list[Tokenized], unmasked: list[Tokenized], config: TrainConfig) -> dict[str, float]:
    """The length of replies and what it costs, the share that a limit cut off, the replies per
    trajectory, and the tokens left for the loss.
    """
    replies = [size for rollout in tokenized for size in rollout.replies]
    penalties = [overlong_penalty(rollout, config) for rollout in tokenized]
    costs = {} if config.overlong_tokens is None else {"overlong_penalty": sum(penalties) / len(penalties)}
    return costs | {
        "reply_tokens_mean": sum(replies) / len(replies),
        "reply_tokens_max": float(max(replies)),
        "replies_truncated": sum(rollout.truncated for rollout in tokenized) / len(replies),
        "turns_mean": len(replies) / len(tokenized),
        "trajectories_masked": float(len(tokenized) - len(unmasked)),
        "tokens_sampled": float(sum(sequence.scored for rollout in unmasked for sequence in rollout.sequences)),
    }


def _means(trajectories: list[Trajectory]) -> dict[str, float]:
    """The mean of each metric over the trajectories that have it."""
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.metrics.items():
            values.setdefault(name, []).append(float(value))
    return {f"rollout/{name}": math.fsum(values[name]) / len(values[name]) for name in sorted(values)}
