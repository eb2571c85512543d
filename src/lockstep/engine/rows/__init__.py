"""A row of a packed batch on the device: the visibility of its tokens, and its routed experts."""
