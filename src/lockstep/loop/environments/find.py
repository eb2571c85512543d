"""The task of a run's file: a Python file of the user's, or an environment by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.errors import ConfigError
from lockstep.loop.task import Task, load_task

if TYPE_CHECKING:
    from lockstep.loop.run_file import TaskSection

KINDS = ("reasoning_gym", "jsonl", "verifiers", "harbor")
"""Each is a module here with `task(name, section, folder)`."""


def task_of(section: TaskSection, folder: Path) -> Task:
    """The task that [task] names.

    folder: of the run's file; other files are relative to it.

    Raises ConfigError for an unknown environment, and for what its module finds wrong.
    """
    if section.file is not None:
        return load_task(folder / section.file)
    kind, _, name = str(section.environment).partition(":")
    if kind not in KINDS or not name:
        known = ", ".join(f"{known}:NAME" for known in KINDS)
        raise ConfigError(f"[task] environment = {section.environment!r} is not known: use one of {known}")
    return importlib.import_module(f"lockstep.loop.environments.{kind}").task(name, section, folder)
