"""Processes of Lockstep that outlived who started them, or stand still: there should be none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lockstep.process import guard


@dataclass(frozen=True)
class Leftover:
    """A guard whose parent is gone, or a stopped process below a guard. pid: to end."""

    pid: int
    says: str


def leftovers() -> list[Leftover]:
    """Of this user, on Linux."""
    made = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it ended meanwhile
            continue
        parent = _guarded_by(words)
        if parent is None:
            continue
        if not Path(f"/proc/{parent}").exists():
            made.append(
                Leftover(int(entry.name), f"guard {entry.name} goes on though process {parent}, its parent, is gone")
            )
        elif state == "T":
            made.append(Leftover(int(entry.name), f"guard {entry.name} of process {parent} is stopped"))
    return sorted(made, key=lambda process: process.pid)


def _guarded_by(words: list[str]) -> int | None:
    """The parent that a guard's command line names; None for another process."""
    name = Path(guard.__file__).name
    for place, word in enumerate(words[:-1]):
        if word.endswith(f"lockstep/process/{name}") and words[place + 1].isdecimal():
            return int(words[place + 1])
    return None
