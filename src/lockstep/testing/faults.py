"""A copy of the server's plugin, into which a fault is planted while the server runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

EXTENSION = ("--worker-extension-cls", "planted.Receiver")


class Plot:
    """`runtime`: the environment with the copy, for a server with the arguments `EXTENSION`."""

    def __init__(self, runtime: Any, folder: Path) -> None:
        shutil.copytree(runtime.plugin_path, folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(__file__).with_name("planted.py"), folder)
        self.runtime = replace(runtime, plugin_path=folder)
        self._file = folder / "fault.json"

    @contextmanager
    def planted(self, **fault: str) -> Iterator[None]:
        """Plant the fault that `planted.py` reads from the file."""
        self._file.write_text(json.dumps(fault))
        try:
            yield
        finally:
            self._file.unlink()
