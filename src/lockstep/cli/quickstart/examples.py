"""The examples that come with the package, and a run's file for another place."""

from __future__ import annotations

from pathlib import Path

from lockstep.errors import ConfigError
from lockstep.loop.run_file import RunFile


def examples_folder() -> Path:
    """The examples: beside the package in an installed wheel, at the top of a source checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "_examples", package.parents[1] / "examples"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the examples are missing beside {package}: install lockstep-rl again, or use a source checkout")


def placed(file: RunFile, path: Path, seed: int) -> RunFile:
    """The run in another folder and with another seed."""
    backend, task = file.backend.model_copy(update={"path": path}), file.task.model_copy(update={"seed": seed})
    return file.model_copy(update={"backend": backend, "task": task})
