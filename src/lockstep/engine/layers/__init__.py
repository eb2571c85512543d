"""Layers of a packed row: attention, GatedDeltaNet, experts, adapters, and the output head."""
