"""Planted faults, and what finds them."""
