"""A task from the template: complete, checked by a dry run, and never over somebody's files."""

from __future__ import annotations

import random

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lockstep.cli.init.write import write_task
from lockstep.cli.main import app
from lockstep.errors import ConfigError
from lockstep.loop.run_file import load_run_file
from lockstep.loop.task import load_task

QUIET = Console(quiet=True)


def test_a_new_task_loads_and_names_itself(tmp_path):
    result = CliRunner().invoke(app, ["init", str(tmp_path / "My Task")])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "My Task"
    file = load_run_file(folder / "config.toml")
    assert file.model.name == "my-task"
    task = load_task(folder / file.task.file)
    assert len(task.scenarios) == 64
    assert not {str(scenario) for scenario in task.scenarios} & {
        str(scenario) for scenario in task.evaluation_scenarios
    }
    assert task.demonstrations
    assert len(task.demonstrations(random.Random(0))) == 256
    assert "NAME" not in (folder / "AGENTS.md").read_text()


def test_its_reward_tells_right_from_wrong(tmp_path):
    write_task(tmp_path / "task", QUIET)
    namespace: dict = {}
    exec((tmp_path / "task" / "task.py").read_text(), namespace)
    reward = namespace["reward"]
    assert [reward("it is 12", 12), reward("13", 12), reward("no idea", 12)] == [1.0, 0.1, 0.0]


def test_nothing_is_overwritten(tmp_path):
    write_task(tmp_path / "task", QUIET)
    with pytest.raises(ConfigError, match=r"has task\.py already"):
        write_task(tmp_path / "task", QUIET)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        write_task(tmp_path / "file", QUIET)


def test_the_version_and_short_help():
    assert CliRunner().invoke(app, ["--version"]).output.startswith("lockstep 0.")
    assert "export" in CliRunner().invoke(app, ["-h"]).output
