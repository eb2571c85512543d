"""The weights that a full sync must bring: exactly those of the checkpoint that the server was
started from.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open


class IncompleteError(ValueError):
    """A plan that would leave old weights behind, or brings one in the wrong shape."""


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight in a checkpoint folder, from the files' headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def check(
    sent: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    optional: Callable[[str], bool],
) -> None:
    """Raises IncompleteError when a weight of the checkpoint is missing, or a sent one has another
    shape.

    optional: True for weights that this server doesn't load (other towers), or that it ties to
        another one.
    """
    missing = sorted(name for name in expected if name not in sent and not optional(name))
    if missing:
        raise IncompleteError(
            f"{len(missing)} weight(s) that the server holds would stay old, {missing[0]!r} first: send every weight"
        )
    for name, shape in sent.items():
        if name in expected and tuple(shape) != expected[name]:
            raise IncompleteError(f"weight {name!r} comes as {tuple(shape)} and the checkpoint has {expected[name]}")
