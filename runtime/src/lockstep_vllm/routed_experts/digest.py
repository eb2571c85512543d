"""A digest that binds the routed experts of a choice to its token ids, so that a lost, moved or swapped row is seen.

The trainer's side has the same function (`lockstep.batching.routed_experts.routes_digest`); a test holds the two together.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Sequence

_PREFIX = b"lockstep.routes/1\0"


def routes_digest(prompt_ids: Sequence[int], token_ids: Sequence[int], routes: str) -> str:
    """SHA-256 (hex) over the ids (int32, little endian, each list with its length before it) and the decoded .npy
    bytes.
    """
    digest = hashlib.sha256(_PREFIX)
    for ids in (prompt_ids, token_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(struct.pack(f"<{len(ids)}i", *ids))
    digest.update(base64.b64decode(routes))
    return digest.hexdigest()
