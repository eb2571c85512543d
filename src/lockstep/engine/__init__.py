"""Inside each trainer rank: the model, a training step over packed rows, and scores."""
