"""A digest that binds the routed experts of a choice to its token ids, so that a lost, moved or
swapped row is noticed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Mapping
from typing import Any

_PREFIX = b"lockstep.routes/1\0"  # kept: stored trajectories of earlier versions have it in their digests
_EARLIER = "routes_digest"


def routed_experts_digest(prompt_ids: Collection[Any], token_ids: Collection[Any], npy: bytes) -> str:
    """SHA-256 (hex) over a choice's ids (int32, little endian, each list with its length before it)
    and its .npy bytes.
    """
    digest = hashlib.sha256(_PREFIX)
    for ids in (prompt_ids, token_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(struct.pack(f"<{len(ids)}i", *ids))
    digest.update(npy)
    return digest.hexdigest()


def stored_digest(choice: Mapping[str, Any]) -> str | None:
    """The digest among a choice's fields, also where an earlier version of Lockstep named the
    field.
    """
    return choice.get("routed_experts_digest", choice.get(_EARLIER))
