"""An address and a key per episode: agents in any process call the model there, and what they sample is captured."""
