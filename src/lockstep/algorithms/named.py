"""Tables of a folder's modules by name, and a user's own entries as "module:attribute"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError

_SHARED = ("__init__", "base")


def named_in(package: str, folder: Path, entry: Callable[[Any], Any]) -> dict[str, Any]:
    """By name: the `entry` of each module in the package's folder."""
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem not in _SHARED)
    entries = [entry(importlib.import_module(f"{package}.{module}")) for module in modules]
    return {named.name: named for named in entries}


def imported(name: str, known: str) -> Any:
    """The object that a user names as "module:attribute".

    known: the names without a colon, for the error.

    Raises ConfigError for another form, and for what can't be imported.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"must be one of {known}, or your own as module:function")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"can't be imported: {error}; its module must be on PYTHONPATH") from None
