"""What `lockstep report` and `lockstep watch` say in the terminal."""

from __future__ import annotations

import math
import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lockstep.cli.report.page import write_page
from lockstep.cli.report.record import RunRecord, read_run
from lockstep.errors import ConfigError

_EVERY_S = 2.0
_ROWS = 20
_COLUMNS = {
    "reward": ("reward", ".3f"),
    "±": ("reward_std", ".3f"),
    "greedy": ("greedy_reward", ".3f"),
    "loss": ("loss", "+.4f"),
    "mismatch": ("mismatch", ".1e"),
    "entropy": ("entropy", ".3f"),
    "tokens": ("reply_tokens_mean", ".0f"),
    "cut off": ("replies_truncated", ".0%"),
    "seconds": ("", ""),
}


def write_report(run: Path, output: Path | None, console: Console) -> None:
    """Write a run's page, and say what it found.

    output: None writes RUN/report.html.

    Raises ConfigError for an output that can't be written, StoreError for a folder that is no run.
    """
    file = (run / "report.html" if output is None else output).expanduser().resolve()
    if file.is_dir() or (output is not None and not file.parent.is_dir()):
        raise ConfigError(f"--output {output}: give a file in a folder that exists")
    record = write_page(run, file)
    for given in record.advice:
        console.print(f"[bold yellow]{escape(given.says)}[/]", highlight=False, soft_wrap=True)
        console.print(f"  {given.remedy}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{file}  {file.stat().st_size / 1e6:.1f} MB", markup=False, highlight=False, soft_wrap=True)


def watch_run(run: Path, once: bool, console: Console) -> None:
    """Until Ctrl-C. Raises StoreError for a folder that is no run."""
    if once or not console.is_terminal:
        console.print(shown(read_run(run)))
        return
    with Live(shown(read_run(run)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_EVERY_S)
            live.update(shown(read_run(run)), refresh=True)


def shown(record: RunRecord) -> Group:
    """The newest steps, what is under way, and advice."""
    table = Table(title=Text(record.name), title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in ("step", *_COLUMNS):
        table.add_column(name, justify="right", min_width=6, no_wrap=True)
    steps = sorted(record.metrics)
    for step in steps[-_ROWS:]:
        values = record.metrics[step]
        cells = [_number(values.get(name), form) for name, form in _COLUMNS.values() if name]
        table.add_row(str(step), *cells, _number(_seconds(record, step), ".1f"))
    running = [job for job in record.jobs if job.state == "running"]
    busy = [Text(f"{job.id}: {job.phase or 'starting'}", "dim") for job in running]
    advice = [Text(f"{given.says}\n  {given.remedy}", "yellow") for given in record.advice]
    return Group(table, *busy, *advice)


def _seconds(record: RunRecord, step: int) -> float | None:
    """From the publication of the step before."""
    before, after = record.published_at.get(step - 1), record.published_at.get(step)
    return None if before is None or after is None else after - before


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)
