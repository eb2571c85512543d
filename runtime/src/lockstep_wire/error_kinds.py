"""The server's names for its refusals: the `type` of an error in a reply of the sync API."""

from __future__ import annotations

WEIGHTS = "weights"
"""Weights that are missing, unknown, or of the wrong shape."""
MISMATCH = "mismatch"
"""The received bytes, or the live memory after them, differ from the sent bytes."""
LOST = "lost"
"""The server may hold a mixture of two versions, and ends itself."""
SERVER = "server"
"""Everything else: a deadline, a call out of order, a sender that is gone."""
