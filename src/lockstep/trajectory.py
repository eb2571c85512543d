"""Trajectories, groups of them, gathering them, and keeping them in Parquet: the public face of four small modules."""

from __future__ import annotations

from lockstep.gather import gather_trajectory_groups
from lockstep.parquet import read_parquet, write_parquet
from lockstep.records import RolloutFailure, Trajectory, TrajectoryGroup

__all__ = [
    "RolloutFailure",
    "Trajectory",
    "TrajectoryGroup",
    "gather_trajectory_groups",
    "read_parquet",
    "write_parquet",
]
