"""How good is a reply? 1 for the capital alone, 0.5 where it stands among other words."""

from typing import Any


def score(text: str, row: dict[str, Any]) -> float:
    """text: what the model said. row: the line of the file."""
    said, right = text.strip().strip(".").lower(), row["answer"].lower()
    return 1.0 if said == right else 0.5 * (right in said)
