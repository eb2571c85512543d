"""The optimizer, the parameters that it trains, and its state on disk."""
