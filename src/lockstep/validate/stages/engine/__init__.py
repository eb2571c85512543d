"""Stages that run the training engine."""
