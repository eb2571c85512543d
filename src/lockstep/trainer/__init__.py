"""The trainer seen from the parent process: its messages and its client. Imports no torch."""
