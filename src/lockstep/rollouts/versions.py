"""The steps that sampled a group's tokens, as the server's choices say."""

from __future__ import annotations

from lockstep.rollouts.trajectory import TrajectoryGroup


def oldest_step(group: TrajectoryGroup) -> int | None:
    """The step that sampled the group's oldest token; None where no choice says."""
    steps = [
        int(step)
        for trajectory in group.trajectories
        for choice in trajectory.choices
        for span in (choice.model_extra or {}).get("weight_versions") or ()
        if span["end"] > span["start"] and (step := str(span["version"]).rpartition("@")[2]).isdecimal()
    ]
    return min(steps, default=None)
