"""Base models that commands make: a tiny one with a taught format, and a small real one."""
