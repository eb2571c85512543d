"""How the server names what it refuses: the `type` of an error in a reply of the sync API."""

from __future__ import annotations

WEIGHTS = "weights"
"""Weights that are missing, unknown, or of the wrong shape."""
MISMATCH = "mismatch"
"""What was received, or what the live memory then holds, is not what was sent."""
LOST = "lost"
"""The server may hold a mixture of two versions, and ends itself."""
SERVER = "server"
"""Everything else: a deadline, a call out of order, a sender that is gone."""
