"""Write a task of the user's own from the template."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from lockstep.errors import ConfigError

_FILES = ("task.py", "config.toml", "AGENTS.md")


def write_task(folder: Path, console: Console) -> None:
    """Raises ConfigError, before anything is written, where one of the files exists."""
    folder = folder.expanduser()
    taken = [name for name in _FILES if (folder / name).exists()]
    if taken or folder.is_file():
        raise ConfigError(f"{folder} {'has ' + taken[0] if taken else 'is a file'} already: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "task"
    template = files("lockstep.cli.init") / "template"
    for file in _FILES:
        text = (template / file).read_text(encoding="utf-8")
        (folder / file).write_text(text.replace("NAME", name), encoding="utf-8")
    for line in (
        f"{folder / 'task.py'}: scenarios and the rollout with its reward; change this",
        f"{folder / 'config.toml'}: the model, and how it is trained",
        f"try it       lockstep train {folder / 'config.toml'} --tiny",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
