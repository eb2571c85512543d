"""A digest that binds the text of a choice to its token ids, so that editing after sampling is
noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def reply_digest(token_ids: Sequence[int], message: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over a choice's sampled ids, and its message's text and tool calls (name and
    arguments of each).

    message: as in JSON. What clients fill in or leave out (None, empty lists, further fields) does
        not count.
    """
    functions = [call.get("function") or {} for call in message.get("tool_calls") or []]
    calls = [[function.get("name"), function.get("arguments")] for function in functions]
    described = json.dumps(["lockstep.reply/1", list(token_ids), message.get("content") or "", calls])
    return hashlib.sha256(described.encode()).hexdigest()
