"""Who waits for whom in the asynchronous loop, and what to do about it, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

_MUCH = 0.1
"""Share of the time from which a wait is worth a change."""


@dataclass
class Waits:
    """Seconds of a run.

    for_rollouts: the trainer waited for groups.
    for_slow_groups: places were free, and the queue was full of groups under way.
    for_trainer: places were free, and the queue was full of groups that are ready.
    """

    seconds: float = 0.0
    for_rollouts: float = 0.0
    for_slow_groups: float = 0.0
    for_trainer: float = 0.0

    def add(self, for_rollouts: float, for_trainer: float, for_slow_groups: float) -> None:
        """What a step has waited."""
        self.for_rollouts += for_rollouts
        self.for_trainer += for_trainer
        self.for_slow_groups += for_slow_groups

    def advice(self, bound: int) -> str:
        """bound: `max_steps_off_policy`."""
        if self.seconds <= 0:
            return "no step was made"
        trainer, rollouts = self.for_rollouts / self.seconds, self.for_trainer / self.seconds
        waits = f"the trainer waited {trainer:.0%} of the time for rollouts, rollouts {rollouts:.0%} for the trainer"
        if bound == 0:
            return f"{waits}: they take turns; max_steps_off_policy = 1 or more lets them overlap"
        if trainer < _MUCH:
            return f"{waits}: the trainer is busy; more GPUs for it make the run faster"
        if self.for_slow_groups > self.for_rollouts / 2:
            return f"{waits}: slow groups hold a step up; a larger max_steps_off_policy lets more groups run meanwhile"
        return f"{waits}: the server is busy; more GPUs for it, or a larger max_concurrent, make the run faster"
