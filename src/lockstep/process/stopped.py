"""Processes that were stopped (SIGSTOP): they look alive, and never answer."""

from __future__ import annotations

from pathlib import Path


def stopped_below(pid: int) -> list[int]:
    """Ids of the stopped processes among `pid` and all below. Empty where there is no /proc."""
    stopped, waiting = [], [pid]
    while waiting:
        process = waiting.pop()
        try:
            # "pid (command) state ...": the command may hold blanks and brackets.
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            children = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
        except (OSError, IndexError):  # ended meanwhile
            continue
        waiting += [int(child) for text in children for child in text.split()]
        if state == "T":
            stopped.append(process)
    return sorted(stopped)
