"""Rollouts: trajectories, groups of them, gathering them, and keeping them in Parquet files."""
