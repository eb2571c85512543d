"""The trajectories of a step that can be trained on. One that can't be is left out, as a rollout
that failed is.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from lockstep.batching.pack import fit
from lockstep.batching.routed_experts import RoutedExpertsShape
from lockstep.batching.tokenize import MOST_IDS, Tokenized, check_staleness, tokenize
from lockstep.errors import DataError

if TYPE_CHECKING:
    from lockstep.config.train import TrainConfig
    from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usable:
    """A trajectory that can be trained on, and its sequences."""

    trajectory: Trajectory
    tokenized: Tokenized


@dataclass(frozen=True)
class Selected:
    """groups: those that can be trained on, by their index among all groups.
    skipped: groups that failed rollouts and dropped trajectories left with fewer than two.
    dropped: trajectories left out, by what is wrong with them.
    """

    groups: dict[int, list[Usable]]
    skipped: int
    dropped: Counter[str]

    @property
    def usable(self) -> list[Usable]:
        """The trajectories of all groups, in order."""
        return [message for group in self.groups.values() for message in group]

    def dropped_metrics(self) -> dict[str, float]:
        by_kind = {f"trajectories_dropped_{kind}": float(count) for kind, count in sorted(self.dropped.items())}
        return {"trajectories_dropped": float(self.dropped.total())} | by_kind


def select(
    groups: Sequence[TrajectoryGroup],
    model_name: str,
    step: int,
    config: TrainConfig,
    routed_experts: RoutedExpertsShape | None,
    vocabulary: int = MOST_IDS,
) -> Selected:
    """Check and tokenize every trajectory, and leave out those that can't be trained on, each named
    in a warning.

    Raises DataError or StaleRolloutError if more trajectories drop out than `config.max_dropped`
    tolerates, or if none is left. Causes that only a bug explains raise at once: another model,
    missing ids, log-probabilities, versions or routed experts.
    """
    if not groups:
        raise DataError("the batch is empty: there is no group to train on")
    usable: dict[int, list[Usable]] = {number: [] for number in range(len(groups))}
    errors: list[DataError] = []
    for number, group in enumerate(groups):
        for index, trajectory in enumerate(group.trajectories):
            try:
                usable[number].append(
                    _checked(trajectory, model_name, number, index, step, config, routed_experts, vocabulary)
                )
            except DataError as error:
                if error.unusable is None:
                    raise
                errors.append(error)
    _check_limit(errors, sum(len(group.trajectories) for group in groups), config.max_dropped)
    kept = {
        number: some
        for number, some in usable.items()
        if len(some) >= 2 or not (groups[number].exceptions or len(some) < len(groups[number].trajectories))
    }
    if not kept:
        why = f"; first: {errors[0]}" if errors else ""
        kind = type(errors[0]) if errors else DataError
        raise kind(
            f"the batch is empty: failed rollouts left each of its {len(groups)} groups with fewer than 2 trajectories{why}"
        )
    for error in errors:
        _LOG.warning("left out of the step: %s", error)
    return Selected(kept, len(groups) - len(kept), Counter(str(error.unusable) for error in errors))


def _checked(
    trajectory: Trajectory,
    model_name: str,
    group: int,
    index: int,
    step: int,
    config: TrainConfig,
    routed_experts: RoutedExpertsShape | None,
    vocabulary: int,
) -> Usable:
    name = f"group {group}, trajectory {index}"
    tokenized = tokenize(trajectory, model_name, group, index, routed_experts, vocabulary)
    check_staleness(tokenized.steps, step, config.max_steps_off_policy, name)
    if config.over_length == "error":
        fit(tokenized.sequences, config.row_length, "error")
    if config.advantage_per == "turn":
        trajectory.rewards_by_turn()
    for metric, value in trajectory.metrics.items():
        if not (isinstance(value, Real) and math.isfinite(value)):
            raise DataError(
                f"{name}: metrics[{metric!r}] is {value!r}: give a finite number, or leave it out", unusable="metric"
            )
    return Usable(trajectory, tokenized)


def _check_limit(errors: list[DataError], trajectories: int, limit: int | float) -> None:
    """Raise the first error's kind if there are more than `limit` errors: a count, or a share
    rounded up.
    """
    tolerated = math.ceil(round(limit * trajectories, 6)) if limit < 1 else int(limit)
    if len(errors) > tolerated:
        raise type(errors[0])(
            f"{len(errors)} of {trajectories} trajectories can't be trained on, {tolerated} tolerated (max_dropped); "
            f"first: {errors[0]}"
        )
