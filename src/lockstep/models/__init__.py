"""Model support: which models, their weight contract, and their checkpoints. One folder per family."""
