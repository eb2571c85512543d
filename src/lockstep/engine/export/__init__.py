"""Weights and adapters on their way out of the trainer."""
