"""Adapters from memory and from folders into vLLM's slots."""
