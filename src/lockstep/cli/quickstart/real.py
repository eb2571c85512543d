"""`lockstep quickstart --real`: a real model learns arithmetic, and shows what it says before and
after.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.cli.base_models.real_model import smollm2
from lockstep.errors import ConfigError
from lockstep.inference.environment.locate import default_kind
from lockstep.loop.environments.find import task_of
from lockstep.loop.run_file import RunFile, load_run_file
from lockstep.loop.task import Task

if TYPE_CHECKING:
    from rich.console import Console

    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import Trajectory

RISE = 0.15
"""The required rise of the greedy reward on held-out questions."""
_SHOWN = 5
ON_A_CPU: dict[str, dict[str, Any]] = {
    "backend": {"dtype": "float32"},  # which its cores multiply faster than bf16
    "task": {
        "groups_per_step": 16,
        "group_size": 8,
        "temperature": 0.7,
        "evaluate_every": 3,
        "evaluate_scenarios": 64,
    },
    "train": {"learning_rate": 5e-4, "row_length": 512},  # short rows: attention there reads a mask of S x S
}
"""Changes for a machine of two cores, on which the run file's settings take longer than ten
minutes: fewer and likelier replies, larger steps.
"""


@dataclass
class Replies:
    """The model's answer to each evaluation scenario: step -> scenario -> (reply, reward)."""

    by_step: dict[int, dict[Any, tuple[str, float]]] = field(default_factory=lambda: defaultdict(dict))

    def listening(self, task: Task) -> Task:
        """The same task, whose greedy replies are kept here."""

        async def rollout(model: TrainableModel, scenario: Any, temperature: float) -> Trajectory:
            trajectory = await task.rollout(model, scenario, temperature)
            if temperature == 0:
                text = trajectory.choices[-1].message.content or ""
                self.by_step[model.step][scenario] = (text, trajectory.reward)
            return trajectory

        return replace(task, rollout=rollout)

    def changed(self) -> list[tuple[Any, str, str]]:
        """(scenario, first reply, last reply), those that were learned first."""
        if not self.by_step:
            return []
        first, last = self.by_step[min(self.by_step)], self.by_step[max(self.by_step)]
        both = sorted(first.keys() & last.keys(), key=lambda scenario: first[scenario][1] - last[scenario][1])
        return [(scenario, first[scenario][0], last[scenario][0]) for scenario in both]


async def train_real(path: Path, seed: int, console: Console) -> int:
    """Fetch the model, train it until the reward has risen by RISE, and print replies. Returns the
    exit code.
    """
    from lockstep.cli.quickstart.examples import examples_folder, placed
    from lockstep.cli.train import execute

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    config = examples_folder() / "arithmetic" / "config.toml"
    file = placed(load_run_file(config), path, seed)
    task = task_of(file.task, config.parent)  # before the download: it may lack a package
    _check_packages()
    base = await asyncio.to_thread(smollm2, say)
    replies = Replies()
    code = await execute(_on_this_machine(file, base), config, False, console, replies.listening(task), RISE)
    say("")
    for scenario, before, after in replies.changed()[:_SHOWN]:
        say(f"{scenario.text}\n  before  {' '.join(before.split())}\n  after   {' '.join(after.split())}")
    return code


def _check_packages() -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the real model needs the package gguf: pip install lockstep-rl[gguf]")


def _on_this_machine(file: RunFile, base: Path) -> RunFile:
    """The base model is the folder. A CPU gets settings that it can pay for (`ON_A_CPU`)."""
    file = file.model_copy(update={"model": file.model.model_copy(update={"base_model": str(base)})})
    if default_kind() != "cpu":
        return file
    sections = {name: getattr(file, name).model_copy(update=changes) for name, changes in ON_A_CPU.items()}
    return file.model_copy(update=sections)
