"""Reports of validation stages as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lockstep.validate.stage import Report


def table(report: Report) -> Table:
    """One line per comparison with what was sampled, by policy; fits 80 columns."""
    title = f"{report.stage}: {report.base_model}, {report.dtype}"
    shown = Table(
        title=Text(title),
        title_justify="left",
        caption=Text(report.limits if report.ok else f"{report.limits}\n{report.advice}".rstrip()),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0),
    )
    shown.add_column("", no_wrap=True)
    for heading in report.columns.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("")
    policy = None
    for row in report.comparisons:
        if row.policy != policy:
            policy = row.policy
            shown.add_row(Text(policy, style="bold"))
        numbers = [_number(row.values.get(name)) for name in report.columns]
        verdict = {True: "[green]ok[/]", False: "[bold red]no[/]", None: ""}[row.ok]
        shown.add_row(Text(f" {row.compared}"), *numbers, verdict)
    return shown


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def write_json(reports: Sequence[Report], path: Path) -> None:
    """Write all reports into one file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.staging")
    staged.write_text(json.dumps([report.as_json() for report in reports], indent=1) + "\n", encoding="utf-8")
    staged.replace(path)
