"""The plan of a run: every setting resolved and checked before any process starts."""
