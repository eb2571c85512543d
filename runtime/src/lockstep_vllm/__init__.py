"""Lockstep's part inside the vLLM server. Loaded by vLLM through its plugin entry points, never by
the trainer.
"""
