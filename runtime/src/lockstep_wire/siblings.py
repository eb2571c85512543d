"""Chat requests that differ in their seed alone, sent as one: the rollouts of a group begin with the
same prompt.

The client posts `{"request": {...}, "seeds": [...]}` to `http_paths.SIBLINGS`. The server answers a
line of JSON for each seed, in the order in which the replies end. Such a reply is the one that the
request with this seed gets from `/v1/chat/completions`.
"""

from __future__ import annotations

import json
from typing import Any

MOST = 1024
"""Seeds of one post, at most."""


def posted(request: dict[str, Any], seeds: list[int | None]) -> dict[str, Any]:
    """The body of a post.

    request: of a chat completion, without its seed.
    seeds: one for each sibling; None leaves the noise to the server.
    """
    return {"request": request, "seeds": seeds}


def line(position: int, reply: dict[str, Any] | None) -> bytes:
    """One line of the answer.

    position: of the sibling's seed in `seeds`.
    reply: None if the sibling failed. Asked for alone, it gets the reason.
    """
    return json.dumps([position, reply], ensure_ascii=False).encode() + b"\n"


def read(text: str) -> tuple[int, dict[str, Any] | None]:
    """The position and the reply of a line."""
    position, reply = json.loads(text)
    return position, reply
