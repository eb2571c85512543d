"""Error texts of a bounded length. They repeat a part of what came, which may be of any length."""

from __future__ import annotations

_BEGINNING, _END = 1500, 500
"""Characters that are kept: the beginning says what is wrong, the end what to do."""


def shortened(text: str) -> str:
    """The text without its middle, where it is longer than a reader wants."""
    if len(text) <= _BEGINNING + _END:
        return text
    return f"{text[:_BEGINNING]} [...] {text[-_END:]}"
