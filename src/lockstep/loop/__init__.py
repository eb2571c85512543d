"""The training loop and what it reads: a task and a run's file."""
