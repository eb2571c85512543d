"""The reason of a server's end from its log, short enough for an error message."""

from __future__ import annotations

import re

from lockstep.process.child import Child

# "(EngineCore pid=7) ERROR 11-21 01:02:03 [core.py:1] " before the text itself.
_PREFIX = re.compile(r"^(?:\([\w ]+pid=\d+\) )?(?:(?:ERROR|WARNING|INFO|DEBUG) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b: \S")
# vLLM's parent processes only repeat that a child failed.
_REPEATS = ("Engine core initialization failed", "WorkerProc initialization failed", "cancelled")
# What native libraries print on their way out.
_CHATTER = ("nanobind:", "- leaked ", "- ... skipped", "See https://nanobind")


def why_it_ended(child: Child, what: str, lines: int = 12) -> str:
    """`NAME what: the exception at the root (log: PATH)`, then the log's last lines."""
    log = [_PREFIX.sub("", line).rstrip() for line in child.log_tail(400).splitlines()]
    log = [line for line in log if line and not line.strip().startswith(_CHATTER)]
    reason = root_cause(log)
    last = "\n".join(f"  | {line[:300]}" for line in log[-lines:])
    return f"{child.name} {what}{': ' + reason if reason else ''} (log: {child.log_path})\n{last}"


def root_cause(log: list[str]) -> str:
    """The first exception in the log that is not a parent's report of its child's; empty if there
    is none.
    """
    lines = [line.strip() for line in log]
    exceptions = [_with_detail(lines, index) for index, line in enumerate(lines) if _EXCEPTION.match(line)]
    own = [line for line in exceptions if not any(repeat in line for repeat in _REPEATS)]
    return (own or exceptions or [""])[0][:500]


def _with_detail(lines: list[str], index: int) -> str:
    """pydantic says what is wrong on the lines behind its exception's first."""
    line = lines[index]
    return " ".join([line, *lines[index + 1 : index + 3]]) if "validation error" in line else line


def last_words(child: Child) -> str:
    """The last line of the log, without its prefix: what the server is busy with."""
    log = [_PREFIX.sub("", line).strip() for line in child.log_tail(5).splitlines()]
    return next((line[:120] for line in reversed(log) if line), "")
