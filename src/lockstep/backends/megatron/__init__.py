"""Megatron-Core and vLLM on this machine: settings, start, training, publishing and its
verification.
"""
