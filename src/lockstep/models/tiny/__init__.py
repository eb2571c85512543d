"""Small random checkpoints of every family, for tests and first steps."""
