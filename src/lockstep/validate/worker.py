"""The process of one stage: `python -m lockstep.validate.worker STAGE REQUEST.json`.

It appends progress to `progress` beside the request, and writes `outcome.json` there. A stage that
raises fails with what it raised; the traceback is in the log.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from lockstep.process.durable import write_whole
from lockstep.validate.figures import FAILED, Outcome
from lockstep.validate.registry import stage_named
from lockstep.validate.request import Request, request_from_json

PROGRESS, OUTCOME = "progress", "outcome.json"


def run_stage(name: str, request: Request) -> Outcome:
    """Run one stage in this process. Raises what the stage raises."""
    stage = importlib.import_module(f"lockstep.validate.{stage_named(name).module}")
    answer = stage.run(request)
    return asyncio.run(answer) if inspect.iscoroutine(answer) else answer


def main(name: str, path: Path) -> None:
    folder = path.parent

    def say(line: str) -> None:
        with (folder / PROGRESS).open("a", encoding="utf-8") as file:
            file.write(line.replace("\n", " ") + "\n")

    started = time.monotonic()
    try:
        outcome = run_stage(name, request_from_json(json.loads(path.read_text(encoding="utf-8")), say))
    except Exception as error:  # noqa: BLE001 (the report says what any stage died of)
        traceback.print_exc()
        outcome = Outcome(status=FAILED, reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:600])
    outcome = replace(outcome, seconds=round(time.monotonic() - started, 2))
    write_whole(folder / OUTCOME, json.dumps(outcome.as_json()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
