"""Stages that read the model's files only."""
