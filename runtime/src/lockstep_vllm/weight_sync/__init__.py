"""Weights from the trainer into the live model: receive, load, check."""
