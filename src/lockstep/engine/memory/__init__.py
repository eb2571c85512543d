"""Offloading from the device while others use it, and recomputation in the backward pass."""
