"""The metrics sinks: one file each in this folder, and whatever a user names as "module:function".
A sink's package is imported when the sink opens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import cast

from lockstep.algorithms.named import imported, named_in
from lockstep.errors import ConfigError
from lockstep.metrics.sinks.base import Sink, SinkKind, SinkRun

ALWAYS = "jsonl"
"""The sink that every run has."""


@cache
def named_sinks() -> dict[str, SinkKind]:
    """By name: the `SINK` of each module in this folder."""
    return named_in(__name__, Path(__file__).parent, lambda module: module.SINK)


def find_sinks(names: Sequence[str]) -> list[SinkKind]:
    """The sinks of the setting `sinks`, after the one that every run has.

    A name is that of a file here, or a user's "module:attribute": a `SinkKind`, or a function that
    makes a sink of a `SinkRun`. Raises ConfigError for a name that is unknown, written twice or
    can't be imported, and for a sink whose package or key is missing.
    """
    for name in names:
        if names.count(name) > 1 or name == ALWAYS:
            raise ConfigError(f"sinks: {name} is {'always there' if name == ALWAYS else 'there twice'}: leave it out")
    kinds = [_find(name) for name in names]
    for kind in kinds:
        if kind.package is not None and importlib.util.find_spec(kind.package) is None:
            raise ConfigError(f"sinks: {kind.name} needs the package {kind.package}: pip install {kind.package}")
        if (problem := kind.problem()) is not None:
            raise ConfigError(f"sinks: {kind.name}: {problem}")
    return [named_sinks()[ALWAYS], *kinds]


def _find(name: str) -> SinkKind:
    if name in named_sinks():
        return named_sinks()[name]
    try:
        value = imported(name, ", ".join(known for known in named_sinks() if known != ALWAYS))
    except ConfigError as error:
        raise ConfigError(f"sinks: {name!r} {error}") from None
    if not isinstance(value, SinkKind) and not callable(value):
        raise ConfigError(
            f"sinks: {name!r} is a {type(value).__name__}: expected a SinkKind, or a function of a SinkRun"
        )
    return value if isinstance(value, SinkKind) else SinkKind(name, cast(Callable[[SinkRun], Sink], value))
