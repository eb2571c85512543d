"""Qwen3.5 and Qwen3.6, text only: GatedDeltaNet and gated attention, dense and mixture of experts."""
