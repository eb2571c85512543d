"""What a rank does with a packed batch: a training step, or scores, and the checks of both."""
