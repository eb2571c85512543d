"""`lockstep validate`: each stage in a process of its own, under a deadline, with live progress.

Several stages may run at a time: no stage reads what another wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lockstep.process.child import Child, child_env, spawn, visible_gpus
from lockstep.validate.figures import FAILED, NOT_APPLICABLE, PASSED, Outcome, outcome_from_json
from lockstep.validate.registry import StageSpec
from lockstep.validate.request import Request
from lockstep.validate.worker import OUTCOME, PROGRESS

_POLL_S = 0.2
_LOG_LINES = 15
Say = Callable[[str], None]
Done = Callable[[StageSpec, Outcome], None]


@dataclass(frozen=True)
class Hooks:
    """Called when a stage begins, with its progress, and when it ends."""

    starts: Say
    say: Say
    done: Done


def run_stages(
    stages: Sequence[StageSpec], request: Request, moe: bool, hooks: Hooks, stop: bool = False, jobs: int = 1
) -> dict[str, Outcome]:
    """The outcome of each stage that was begun.

    request: as for every stage; each gets a folder below its folder.
    moe: the model has experts.
    stop: begin no further stage after one that failed.
    jobs: stages that run at a time.
    """
    outcomes: dict[str, Outcome] = {}
    waiting, running = list(stages), list[_Running]()

    def ended(stage: StageSpec, outcome: Outcome) -> None:
        outcomes[stage.name] = outcome
        hooks.done(stage, outcome)
        if stop and outcome.status == FAILED:
            waiting.clear()

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                stage = waiting.pop(0)
                hooks.starts(stage.name)
                if stage.moe_only and not moe:
                    ended(stage, Outcome(status=NOT_APPLICABLE, reason="the model has no experts"))
                else:
                    running.append(_Running(stage, replace(request, folder=request.folder / stage.name), jobs))
            for process in list(running):
                if (outcome := process.look(hooks.say)) is not None:
                    running.remove(process)
                    ended(process.stage, outcome)
            time.sleep(_POLL_S if running else 0.0)
    finally:
        for process in running:
            process.child.kill()
    return outcomes


def run_one(stage: StageSpec, request: Request, say: Say) -> Outcome:
    """One stage in its process, in the request's own folder."""
    running = _Running(stage, request, 1)
    try:
        while (outcome := running.look(say)) is None:
            time.sleep(_POLL_S)
    finally:
        running.child.kill()
    return outcome


class _Running:
    """A stage's process. What it dies of, or a missed deadline, is a failed outcome.

    The folder of a stage that passed is removed; the logs of one that failed stay.
    """

    def __init__(self, stage: StageSpec, request: Request, jobs: int) -> None:
        self.stage = stage
        self._request = request
        self._last = ""
        request.folder.mkdir(parents=True)
        path = request.folder / "request.json"
        path.write_text(json.dumps(request.as_json()), encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-m", "lockstep.validate.worker", stage.name, str(path)]
        self._started = time.monotonic()
        self.child = spawn(command, _environment(request, jobs), request.folder / "logs" / "stage.log", stage.name)

    def look(self, say: Say) -> Outcome | None:
        """None while it runs; its newest line of progress is said."""
        ended = self.child.poll() is not None
        if not ended and time.monotonic() <= self._started + self.stage.deadline_s:
            progress = self._request.folder / PROGRESS
            lines = progress.read_text(encoding="utf-8").splitlines() if progress.is_file() else []
            if lines and lines[-1] != self._last:
                self._last = lines[-1]
                say(f"{self.stage.name}: {self._last}")
            return None
        self.child.kill()
        outcome = _outcome(self.stage, self._request, self.child, ended)
        if outcome.status == PASSED:
            shutil.rmtree(self._request.folder, ignore_errors=True)
        return replace(outcome, seconds=round(time.monotonic() - self._started, 1))


def _environment(request: Request, jobs: int) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": visible_gpus([])} if request.device == "cpu" else {}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return child_env({"OMP_NUM_THREADS": threads, **hidden})


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
