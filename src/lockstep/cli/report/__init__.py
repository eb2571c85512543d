"""A run as people see it: one HTML page, a live page, a table in the terminal, and advice."""
