"""`lockstep validate`: run stages one after the other, show each report, and keep them all as JSON."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lockstep.validate.report import table, write_json
from lockstep.validate.stage import Report, Request, check_names, run_stage


async def validate_model(
    base_model: str, stages: Sequence[str], output: Path, settings: dict[str, Any], console: Console
) -> int:
    """The exit code: 0, or 1 if a stage is outside its limits.

    settings: further fields of `Request`.

    Raises ConfigError for an unknown stage before anything starts, and whatever a stage raises.
    """
    check_names(stages)
    reports: list[Report] = []
    for name in stages:
        folder = Path(tempfile.mkdtemp(prefix="lockstep-validate-"))  # stays, with its logs, when the stage fails
        with console.status(name) as status:
            request = Request(base_model, folder, say=lambda line, status=status: status.update(Text(line)), **settings)
            reports.append(await run_stage(name, request))
        shutil.rmtree(folder)
        console.print(table(reports[-1]))
    write_json(reports, output)
    console.print(f"report: {output}", markup=False, highlight=False, soft_wrap=True)
    return 0 if all(report.ok for report in reports) else 1
