"""Where the server's own environment lives, and its installation."""
