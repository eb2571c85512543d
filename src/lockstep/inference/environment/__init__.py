"""The server's own environment, and its installation."""
