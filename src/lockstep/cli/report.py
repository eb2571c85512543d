"""Write a run's page, and say what it found."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lockstep.errors import ConfigError
from lockstep.report.page import write_page


def write_report(run: Path, output: Path | None, console: Console) -> None:
    """output: None writes RUN/report.html.

    Raises ConfigError for an output that can't be written, StoreError for a folder that is no run.
    """
    file = (run / "report.html" if output is None else output).expanduser().resolve()
    if file.is_dir() or (output is not None and not file.parent.is_dir()):
        raise ConfigError(f"--output {output}: give a file in a folder that exists")
    record = write_page(run, file)
    for given in record.advice:
        console.print(f"[bold yellow]{escape(given.says)}[/]", highlight=False, soft_wrap=True)
        console.print(f"  {given.remedy}", markup=False, highlight=False, soft_wrap=True)
    size = file.stat().st_size
    console.print(f"{file}  {size / 1e6:.1f} MB", markup=False, highlight=False, soft_wrap=True)
