"""What a step leaves out is said, and what can't be trained on ends the rollouts at once."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import lockstep as ls
from lockstep.cli.tables.live_table import LiveTable
from lockstep.errors import RolloutError
from lockstep.loop.evaluation import evaluate
from lockstep.loop.run_file import TaskSection
from lockstep.loop.synchronous import roll_out, run
from lockstep.loop.task import Task
from random_batches import choice, trajectory


class Backend:
    """Stands for the parts that a loop asks for; nothing is trained."""

    def __init__(self, model: Any) -> None:
        self.model = model

    async def recover(self, model: Any) -> bool:
        return False

    def record(self, model: Any, metrics: dict[str, float], step: int | None = None) -> None:
        self.recorded = metrics

    async def train(self, model: Any, groups: Any, config: Any) -> Any:
        self.model.step += 1
        return SimpleNamespace(step=model.step, metrics={"loss": 0.0, "seconds_train": 0.0, "seconds_sync": 0.0})


async def test_newcomer_a5_rollouts_that_failed_and_were_tolerated_are_said(tmp_path):
    async def flaky(model, scenario, temperature):
        if temperature and scenario == "bad":
            raise ValueError("a judge [timed out]")
        return trajectory(reward=1.0)

    model: Any = SimpleNamespace(step=0)
    task = Task(Path("task.py"), ["good", "bad"], flaky, None)
    section = TaskSection(file="task.py", steps=1, groups_per_step=2, group_size=2, max_exceptions=0.5)
    rows = []
    await run(model, Backend(model), task, section, ls.TrainConfig(), tmp_path, rows.append)  # pyright: ignore
    assert [len(row.failures) for row in rows] == [0, 1]
    console = Console(file=io.StringIO(), width=400)
    with LiveTable(console, "m") as table:
        table(rows[1])
    shown = console.file.getvalue()  # pyright: ignore
    assert "rollouts for step 1: 2 of 4 rollouts failed; first: ValueError: a judge [timed out] (" in shown
    assert f"tracebacks: {tmp_path / 'trajectories' / 'train' / '0001.parquet'}" in shown


async def test_newcomer_b8_a_constraint_ends_the_step_with_its_first_rollouts_and_no_evaluation():
    """Once all rollouts of the step were paid for, and `train` refused them."""

    async def in_json_mode(model, scenario, temperature):
        if temperature and scenario == "slow":
            await asyncio.sleep(60)
        sampling = {"temperature": 1.0, "response_format": {"type": "json_object"}}
        return trajectory(choice([1, 2], [3, 4], sampling=sampling))

    task = Task(Path("task.py"), ["slow", "quick"], in_json_mode, None)
    section = TaskSection(file="task.py", steps=1, groups_per_step=2, group_size=2, evaluate_scenarios=2)
    says = r"rollout 0: DataError: choice 0 was sampled with response_format = .*, which can't be trained on"
    async with asyncio.timeout(10):
        with pytest.raises(RolloutError, match=says):
            await roll_out(None, task, section, 0)  # pyright: ignore[reportArgumentType]
    assert len(await evaluate(None, task, section)) == 2  # pyright: ignore[reportArgumentType]
