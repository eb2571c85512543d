"""Show what the doctor found."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lockstep import __version__
from lockstep.cli.doctor.facts import gather
from lockstep.cli.doctor.findings import exit_code, findings

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def show(as_json: bool, console: Console) -> int:
    """Returns the exit code: 1 if something would stop every run."""
    facts = gather()
    listed = findings(facts)
    if as_json:
        said = {"version": __version__, "findings": [asdict(finding) for finding in listed], "facts": asdict(facts)}
        print(json.dumps(said, indent=1, default=str))  # noqa: T201  rich would break long lines
        return exit_code(listed)
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in listed:
        level = Text(finding.level, _COLOURS[finding.level])
        table.add_row(
            level, Text(finding.topic), Text(f"{finding.says}\n{finding.remedy}" if finding.remedy else finding.says)
        )
    console.print(f"lockstep {__version__}", highlight=False)
    console.print(table)
    return exit_code(listed)
