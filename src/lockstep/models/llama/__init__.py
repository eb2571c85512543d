"""Llama 3, dense."""
