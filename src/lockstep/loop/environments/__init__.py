"""Tasks that others wrote: a run's file names an environment, and its tasks, rollouts and rewards come from there."""
