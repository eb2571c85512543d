"""Qwen3.5, Qwen3.6 and Qwen3.8, text only: GatedDeltaNet and gated attention, dense and mixture of experts."""
