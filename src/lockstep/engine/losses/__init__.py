"""Policy losses as sums over pairs of a token and the sequence that owns it."""
