"""Tables for a person to read: the progress of a run, and its settings."""
