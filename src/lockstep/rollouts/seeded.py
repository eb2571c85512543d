"""The seeds of an OpenAI client's requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SAMPLING = ("/chat/completions", "/completions", "/responses")


class SeededRequests:
    """Mixed into an OpenAI client: a request that samples gets `next_seed()` where it sets no seed.
    Its retries keep the seed.
    """

    next_seed: Callable[[], int | None]

    async def request(self, cast_to: Any, options: Any, **how: Any) -> Any:
        body = options.json_data
        if options.method.upper() == "POST" and options.url in _SAMPLING and isinstance(body, dict):
            chosen = (options.extra_json or {}).get("seed", body.get("seed"))
            if chosen is None and (seed := self.next_seed()) is not None:
                options = options.model_copy()
                options.json_data = {**body, "seed": seed}
        return await super().request(cast_to, options, **how)  # pyright: ignore[reportAttributeAccessIssue]
