"""Takes secrets out of what a page shows: pages are sent to colleagues, and prompts may hold keys."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

_SHAPES = re.compile(
    r"""
    \b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}                         # OpenAI, Anthropic, Stripe
    |\bhf_[A-Za-z0-9]{20,}                                    # Hugging Face
    |\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}        # GitHub
    |\b(?:AKIA|ASIA)[A-Z0-9]{16}\b                            # AWS
    |\bxox[abprs]-[A-Za-z0-9-]{10,}                           # Slack
    |\bAIza[A-Za-z0-9_-]{30,}                                 # Google
    |\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{5,}                # a JSON web token
    |(?<=Bearer\ )[A-Za-z0-9._~+/-]{12,}
    |-----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
_NAMED = re.compile(
    r"(?i)(?:api[_-]?key|secret|password|passwd|auth[_-]?token|access[_-]?token)[\"']?\s*[:=]\s*[\"']?([^\s\"',;}]{6,})"
)
_KEY = re.compile(r"(?i)(api[_-]?key|secret|password|passwd|auth[_-]?token|access[_-]?token|authorization)$")
_VARIABLE = re.compile(r"(?i)(key|token|secret|password|credentials)$")
_SHORTEST = 8
"""Characters of a value that only its name makes a secret: shorter ones are words."""
MARK = "•"


@cache
def _values_here() -> re.Pattern[str] | None:
    """The values of this process's own secret environment variables."""
    values = {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST}
    return re.compile("|".join(re.escape(value) for value in sorted(values, key=len, reverse=True))) if values else None


def secret_spans(text: str) -> list[tuple[int, int]]:
    """(start, stop) of each secret in `text`."""
    here = _values_here()
    spans = [match.span() for match in _SHAPES.finditer(text)]
    spans += [match.span(1) for match in _NAMED.finditer(text)]
    return spans + ([match.span() for match in here.finditer(text)] if here else [])


def masked(value: Any) -> Any:
    """The same JSON value with a mark in place of each character of a secret."""
    if isinstance(value, str):
        for start, stop in secret_spans(value):
            value = value[:start] + MARK * (stop - start) + value[stop:]
        return value
    if isinstance(value, Mapping):
        return {masked(name): _hidden(item) if _named(name) else masked(item) for name, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, (list, tuple)) else value


def _named(name: object) -> bool:
    """Whether a mapping's key says that its value is a secret."""
    return isinstance(name, str) and bool(_KEY.search(name))


def _hidden(value: Any) -> Any:
    return MARK * len(value) if isinstance(value, str) and len(value) >= _SHORTEST else masked(value)


def masked_pieces(pieces: Sequence[str]) -> list[str]:
    """Pieces of one text, masked where the whole text holds a secret."""
    text = "".join(pieces)
    hidden = masked(text)
    if hidden == text:
        return list(pieces)
    shown, start = [], 0
    for piece in pieces:
        shown.append(hidden[start : start + len(piece)])
        start += len(piece)
    return shown
