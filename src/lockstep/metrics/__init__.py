"""The meaning of metrics, and their computation."""
