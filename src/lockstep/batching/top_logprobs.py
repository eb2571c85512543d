"""The server's most likely tokens in the place of each sampled one, where the client asked for them
with a rollout.

A request with `top_logprobs=20` and `return_tokens_as_token_ids=True` brings them. Without the
second setting they come as text, which does not identify the token. vLLM lists the sampled token
first, then the most likely ones, and stops at 20. So where the sampled token is not among the 20
most likely, the last of those is missing.

Shape suffixes: N sampled tokens of a choice, C most likely ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice
    from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob

TOP = 20
"""The number of ids compared; a server gives no more by default."""
_PREFIX = "token_id:"


def top_ids(choice: Choice) -> np.ndarray | None:
    """int32 `[N, TOP]`, most likely first, -1 where the server didn't say; None if it said nothing."""
    content = (choice.logprobs.content if choice.logprobs is not None else None) or []
    if not any(entry.top_logprobs for entry in content):
        return None
    rows = [_row(entry) for entry in content]
    if not any(rows):
        return None
    return np.array([row + [-1] * (TOP - len(row)) for row in rows], dtype=np.int32)


def _row(entry: ChatCompletionTokenLogprob) -> list[int]:
    given = sorted(entry.top_logprobs, key=lambda candidate: -candidate.logprob)
    if len(given) != TOP or not all(candidate.token.startswith(_PREFIX) for candidate in given):
        return []
    ids = [int(candidate.token.removeprefix(_PREFIX)) for candidate in given]
    # The least likely one, if it was sampled, may be the 20th or any after it.
    return ids[:-1] if given[-1].token == entry.token else ids


def hits(server_NC: np.ndarray, trainer_NC: np.ndarray) -> tuple[float, float]:
    """Sums over tokens: 1 where the most likely token agrees; the share of the server's known ids
    that are also the trainer's.
    """
    known_NC = server_NC >= 0
    found_NC = (server_NC[:, :, None] == trainer_NC[:, None, :]).any(axis=2) & known_NC
    shares_N = found_NC.sum(axis=1) / known_NC.sum(axis=1)
    return float((server_NC[:, 0] == trainer_NC[:, 0]).sum()), float(shares_N.sum())
