"""A verifiers v1 environment, installed in a Python of its own, whose agents call an episode on a real server."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.backends.base import Endpoint
from lockstep.batching.tokenize import tokenize
from lockstep.cli.quickstart.examples import examples_folder
from lockstep.errors import ConfigError
from lockstep.gateway.calls import Terms
from lockstep.gateway.server import Gateway
from lockstep.loop.environments.find import task_of
from lockstep.loop.run_file import TaskSection
from lockstep.rollouts.gather import gather_trajectory_groups

pytestmark = [pytest.mark.server, pytest.mark.slow]
CRASHING = """
import verifiers.v1 as vf
__all__ = ["CrashingTaskset"]

class CrashingTask(vf.Task):
    @vf.reward
    async def right(self, trace) -> float:
        raise KeyError("the scorer broke")

class CrashingTaskset(vf.Taskset[CrashingTask]):
    def load(self):
        yield CrashingTask(vf.TaskData(prompt="Go."), self.config.task)
"""


@pytest.fixture(scope="module")
def verifiers_python(tmp_path_factory) -> str:
    """verifiers needs an older openai than this project's tests."""
    folder = tmp_path_factory.mktemp("verifiers") / "env"
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([uv, "pip", "install", "-q", "--python", python, "verifiers==0.4.0", "uv"], check=True)
    return python


class Served:
    """As much of a model as a rollout asks: episodes on the shared server."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint):
        self._gateway, self._endpoint = gateway, endpoint

    def episode(self, *, sampling):
        return self._gateway.episode(Terms("base", lambda: self._endpoint, sampling), lambda: None)


@pytest.fixture
def served(server):
    gateway = Gateway()
    yield Served(gateway, Endpoint(server.base_url, server.api_key, slots=16, max_model_len=512))
    gateway.close()


def section(name: str, python: str, **options) -> TaskSection:
    options = {"python": python, "sampling": {"max_tokens": 12}, **options}
    return TaskSection(environment=f"verifiers:{name}", steps=1, options=options)


async def test_an_environment_is_rolled_out_and_what_it_sampled_is_trained(verifiers_python, served, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(verifiers_python).parent}:{os.environ['PATH']}")
    task = task_of(section("stock", verifiers_python, held_out=1), examples_folder() / "verifiers")
    assert (task.scenarios, task.evaluation_scenarios) == ([0, 1, 2], [3])
    attempts = [[task.rollout(served, scenario, 1.0) for _ in range(2)] for scenario in task.scenarios[:2]]
    groups = await gather_trajectory_groups(attempts, max_exceptions=0, progress=False)
    for group in groups:
        for trajectory in group.trajectories:
            assert 0.0 <= trajectory.reward <= 1.0
            assert trajectory.metrics == {"right": trajectory.reward}
            (choice,) = trajectory.choices
            assert choice.model_extra["sampling"]["temperature"] == 1.0
            choice.model_extra["weight_versions"][0]["version"] = "base@0"  # as a run names its versions
            (sequence,) = tokenize(trajectory, "base", 0, 0).sequences
            assert sequence.tokens_S.tolist() == [
                *choice.model_extra["prompt_token_ids"],
                *choice.model_extra["token_ids"],
            ]
            assert sequence.loss_mask_S.sum() == len(choice.model_extra["token_ids"]) <= 12


async def test_an_environment_that_raises_is_a_failed_rollout_with_its_traceback(
    verifiers_python, served, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", f"{Path(verifiers_python).parent}:{os.environ['PATH']}")
    (tmp_path / "crashing.py").write_text(CRASHING)
    task = task_of(section("crashing", verifiers_python), tmp_path)
    attempts = [[task.rollout(served, 0, 1.0), task.rollout(served, 0, 1.0)]]
    (group,) = await gather_trajectory_groups(attempts, max_exceptions=2, progress=False)
    assert len(group.exceptions) == 2
    assert all("the scorer broke" in failure.message for failure in group.exceptions)
    assert all("crashing.py" in failure.traceback for failure in group.exceptions)


def test_what_cannot_be_loaded_is_named(verifiers_python, tmp_path):
    with pytest.raises(ConfigError, match=r"verifiers:nowhere can't be loaded by .*taskset 'nowhere' not found"):
        task_of(section("nowhere", verifiers_python), tmp_path)
    with pytest.raises(ConfigError, match=r"No module named 'verifiers'.*pip install lockstep-rl\[verifiers\]"):
        task_of(section("nowhere", sys.executable), tmp_path)
