"""`lockstep validate`: run stages one after the other, show each report, and keep them all as JSON."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lockstep.errors import ConfigError
from lockstep.runs.database import FILE as RUN_FILE
from lockstep.validate.report import table, write_json
from lockstep.validate.stage import Report, Request, check_names, run_stage


async def validate_model(
    model: str, stages: Sequence[str], output: Path, settings: dict[str, Any], console: Console
) -> int:
    """The exit code: 0, or 1 if a stage is outside its limits.

    settings: further fields of `Request`.

    model: a checkpoint's folder, a Hugging Face id, or a run's folder: then its last step, served as
    the run is.

    Raises ConfigError for an unknown stage before anything starts, and whatever a stage raises.
    """
    check_names(stages)
    with ExitStack() as kept:
        base_model = model
        if (Path(model).expanduser() / RUN_FILE).is_file():
            base_model, settings = _last_step(Path(model).expanduser(), settings, kept)
        return await _run_all(base_model, stages, output, settings, console)


def _last_step(run: Path, settings: dict[str, Any], kept: ExitStack) -> tuple[str, dict[str, Any]]:
    """(base model, settings of `Request`) of a run's last step.

    No process removes the step until `kept` ends.

    Raises StoreError for a run without a step, and ConfigError for another dtype than the run's.
    """
    from lockstep.backends.megatron.launch import serving_of
    from lockstep.runs.retention import reading

    server, checkpoint = serving_of(run.resolve(), None)
    kept.enter_context(reading(checkpoint))
    if settings.get("dtype") not in (None, server.dtype):
        raise ConfigError(f"--dtype {settings['dtype']}: the run trains in {server.dtype}; leave it out")
    own = {"dtype": server.dtype, "server": server, "server_args": server.extra_args}
    return str(server.model), settings | own | ({"adapter": checkpoint.adapter} if server.lora else {})


async def _run_all(
    base_model: str, stages: Sequence[str], output: Path, settings: dict[str, Any], console: Console
) -> int:
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
