"""A digest that binds the routed experts of a choice to its token ids, so that a lost, moved or swapped row is seen."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection
from typing import Any

_PREFIX = b"lockstep.routes/1\0"


def routes_digest(prompt_ids: Collection[Any], token_ids: Collection[Any], npy: bytes) -> str:
    """SHA-256 (hex) over a choice's ids (int32, little endian, each list with its length before it) and its .npy bytes."""
    digest = hashlib.sha256(_PREFIX)
    for ids in (prompt_ids, token_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(struct.pack(f"<{len(ids)}i", *ids))
    digest.update(npy)
    return digest.hexdigest()
