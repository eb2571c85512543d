"""`environment = "verifiers:TASKSET"`: a verifiers v1 environment, whose agents call the episode's address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lockstep.config.base import Config
from lockstep.errors import ConfigError
from lockstep.loop.environments.options import options_of
from lockstep.loop.environments.worker import Worker
from lockstep.loop.task import Task

if TYPE_CHECKING:
    from lockstep.loop.run_file import TaskSection
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import Trajectory

_START_S = 300.0


class VerifiersOptions(Config):
    """[task.options] of a verifiers environment."""

    python: str | None = Field(
        default=None, description="the Python that has verifiers and the taskset; not given: the one that runs Lockstep"
    )
    tasks: int = Field(default=1000, gt=0, description="tasks that are taken from the taskset, at most")
    held_out: int = Field(default=0, ge=0, description="tasks at the end that are evaluated, and never trained on")
    env: dict[str, Any] = Field(
        default_factory=dict,
        description="verifiers' own [env] settings; without an agent, its null harness runs in a local process",
    )
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="settings of every request beside the temperature, such as max_tokens"
    )


def task(name: str, section: TaskSection, folder: Path) -> Task:
    """The task of a taskset. Packages are looked for beside the config, too."""
    options = options_of(VerifiersOptions, section)
    local = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
    given = {"agent": local, **options.env}
    begin = {"env": {**given, "taskset": {**given.get("taskset", {}), "id": name}}, "tasks": options.tasks}
    command = [options.python or sys.executable, "-P", str(Path(__file__).with_name("verifiers_process.py"))]
    path = os.pathsep.join([str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "VIRTUAL_ENV": ""}
    count = _count(name, command, environment, begin)
    if count <= options.held_out:
        raise ConfigError(f"verifiers:{name} has {count} tasks, and held_out = {options.held_out}: none is left")
    worker = Worker(f"verifiers:{name}", command, environment, begin)

    async def rollout(model: TrainableModel, scenario: int, temperature: float) -> Trajectory:
        sampling = {**options.sampling, "temperature": temperature}
        with model.episode(sampling=sampling) as episode:
            keys = {"base_url": episode.base_url, "api_key": episode.api_key, "model": episode.model}
            answer = await worker.ask({"task": scenario, "sampling": sampling, **keys})
            return episode.trajectory(reward=answer["reward"], metrics=answer["metrics"], metadata={"task": scenario})

    numbers = list(range(count))
    training = numbers[: count - options.held_out]
    return Task(Path(f"verifiers:{name}"), training, rollout, None, numbers[len(training) :])


def _count(name: str, command: list[str], environment: dict[str, str], begin: dict[str, Any]) -> int:
    """How many tasks the taskset has. Raises ConfigError with what went wrong in the process."""
    try:
        done = subprocess.run(
            command,
            input=json.dumps(begin) + "\n",
            env=environment,
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"verifiers:{name} can't be asked for its tasks: {error}") from None
    first = done.stdout.partition("\n")[0]
    if not first:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        remedy = ": pip install lockstep-rl[verifiers], or set python" if "'verifiers'" in last[0] else ""
        raise ConfigError(f"verifiers:{name} can't be loaded by {command[0]}: {last[0]}{remedy}")
    return json.loads(first)["tasks"]
