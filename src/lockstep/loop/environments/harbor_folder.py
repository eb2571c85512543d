"""A Harbor task folder as it lies on disk: task.toml, instruction.md, environment/, tests/test.sh."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError

_AGENT_S, _VERIFIER_S = 600.0, 600.0
"""Harbor's own defaults."""


@dataclass(frozen=True)
class HarborTask:
    """One task.

    build: the instructions of its Dockerfile, in order, as (name, rest of the line).
    image: a built one, in place of the Dockerfile.
    """

    folder: Path
    instruction: str
    agent_s: float
    verifier_s: float
    verifier_env: dict[str, str] = field(default_factory=dict)
    build: tuple[tuple[str, str], ...] = ()
    image: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def workdir(self) -> str:
        """Where the agent works: the Dockerfile's last WORKDIR, else /app."""
        return next((rest for name, rest in reversed(self.build) if name == "WORKDIR"), "/app")


def read_tasks(folder: Path) -> list[HarborTask]:
    """The task in a folder, or those in its subfolders, by name. Raises ConfigError naming the folder and what is missing."""
    if (folder / "task.toml").is_file():
        return [_read(folder)]
    folders = sorted(path.parent for path in folder.glob("*/task.toml"))
    if not folders:
        raise ConfigError(f"harbor:{folder} has no task: it needs a task.toml, or subfolders with one each")
    return [_read(each) for each in folders]


def _read(folder: Path) -> HarborTask:
    try:
        said = tomllib.loads((folder / "task.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / 'task.toml'}: {error}") from None
    if (folder / "steps").is_dir():
        raise ConfigError(f"{folder} has several steps: only tasks with one instruction.md can be run")
    for name in ("instruction.md", "tests/test.sh"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} has no {name}")
    dockerfile = folder / "environment" / "Dockerfile"
    verifier, environment = _table(said, "verifier"), _table(said, "environment")
    return HarborTask(
        folder,
        (folder / "instruction.md").read_text(encoding="utf-8"),
        _seconds(folder, _table(said, "agent"), _AGENT_S),
        _seconds(folder, verifier, _VERIFIER_S),
        {name: os.path.expandvars(str(value)) for name, value in (verifier.get("env") or {}).items()},
        _instructions(dockerfile.read_text(encoding="utf-8")) if dockerfile.is_file() else (),
        environment.get("docker_image"),
    )


def _table(said: dict[str, Any], name: str) -> dict[str, Any]:
    table = said.get(name) or {}
    return table if isinstance(table, dict) else {}


def _seconds(folder: Path, table: dict[str, Any], default: float) -> float:
    seconds = table.get("timeout_sec", default)
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ConfigError(f"{folder / 'task.toml'}: timeout_sec = {seconds!r} is no number of seconds")
    return float(seconds)


def _instructions(text: str) -> tuple[tuple[str, str], ...]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*\n", " ", "\n".join(lines))
    parts = [line.strip().partition(" ") for line in joined.splitlines()]
    return tuple((name.upper(), rest.strip()) for name, _, rest in parts)
