"""`lockstep validate`: each stage in a process of its own, under a deadline, with live progress."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.process.child import Child, child_env, spawn, visible_gpus
from lockstep.validate.figures import FAILED, NOT_APPLICABLE, PASSED, Outcome, outcome_from_json
from lockstep.validate.registry import StageSpec
from lockstep.validate.request import Request
from lockstep.validate.worker import OUTCOME, PROGRESS

_POLL_S = 0.2
_LOG_LINES = 15
Say = Callable[[str], None]
Done = Callable[[StageSpec, Outcome], None]


def run_stages(
    stages: Sequence[StageSpec], request: Request, moe: bool, stop: bool, starts: Say, say: Say, done: Done
) -> dict[str, Outcome]:
    """The outcome of each stage that was begun.

    request: as for every stage; each gets a folder below its folder.
    moe: the model has experts.
    stop: end after the first stage that fails.
    starts, say, done: called when a stage begins, with its progress, and when it ends.
    """
    outcomes: dict[str, Outcome] = {}
    for stage in stages:
        starts(stage.name)
        if stage.moe_only and not moe:
            outcome = Outcome(status=NOT_APPLICABLE, reason="the model has no experts")
        else:
            outcome = run_one(stage, replace(request, folder=request.folder / stage.name), say)
        outcomes[stage.name] = outcome
        done(stage, outcome)
        if stop and outcome.status == FAILED:
            break
    return outcomes


def run_one(stage: StageSpec, request: Request, say: Say) -> Outcome:
    """One stage in its process. What it dies of, or a missed deadline, is a failed outcome.

    The folder of a stage that passed is removed; the logs of one that failed stay.
    """
    request.folder.mkdir(parents=True)
    path = request.folder / "request.json"
    path.write_text(json.dumps(request.as_json()), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "lockstep.validate.worker", stage.name, str(path)]
    started = time.monotonic()
    child = spawn(command, _environment(request), request.folder / "logs" / "stage.log", stage.name)
    try:
        ended = _wait(child, request.folder / PROGRESS, stage.deadline_s, say)
    finally:
        child.kill()
    outcome = _outcome(stage, request, child, ended)
    if outcome.status == PASSED:
        shutil.rmtree(request.folder, ignore_errors=True)
    return replace(outcome, seconds=round(time.monotonic() - started, 1))


def _environment(request: Request) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": visible_gpus([])} if request.device == "cpu" else {}
    return child_env({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)), **hidden})


def _wait(child: Child, progress: Path, deadline_s: float, say: Say) -> bool:
    """True if the child ended before its deadline. Its newest line of progress is said."""
    deadline, last = time.monotonic() + deadline_s, ""
    while child.poll() is None:
        if time.monotonic() > deadline:
            return False
        lines = progress.read_text(encoding="utf-8").splitlines() if progress.is_file() else []
        if lines and lines[-1] != last:
            last = lines[-1]
            say(last)
        time.sleep(_POLL_S)
    return True


def _outcome(stage: StageSpec, request: Request, child: Child, ended: bool) -> Outcome:
    log = request.folder / "logs" / "stage.log"
    if not ended:
        return Outcome(status=FAILED, reason=f"still running after {stage.deadline_s:g} s; log: {log}")
    written = request.folder / OUTCOME
    if not written.is_file():
        return Outcome(
            status=FAILED, reason=f"its process ended with status {child.poll()}: {child.log_tail(_LOG_LINES)}"
        )
    return outcome_from_json(json.loads(written.read_text(encoding="utf-8")))
