"""Weights from the trainer to the server: sources, buckets, and the sync itself."""
