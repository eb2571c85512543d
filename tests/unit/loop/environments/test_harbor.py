"""Harbor task folders in the local sandbox: what the agent may see and leave, and which rewards count."""

# pyright: reportArgumentType=false

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.cli.quickstart.examples import examples_folder
from lockstep.errors import ConfigError
from lockstep.loop.environments import sandbox as sandboxes
from lockstep.loop.environments.find import task_of
from lockstep.loop.environments.sandbox import LocalSandbox
from lockstep.loop.environments.shell_agent import ShellAgent
from lockstep.loop.environments.worker import EnvironmentFailedError
from lockstep.loop.run_file import TaskSection
from lockstep.rollouts.gather import gather_trajectory_groups
from lockstep.rollouts.trajectory import Trajectory
from random_batches import choice


class Served:
    """As much of a model as a rollout asks of it: an episode in which a reply was sampled, whatever the agent did."""

    def __init__(self):
        self.ended = 0

    @contextmanager
    def episode(self, *, sampling):
        def trajectory(**given) -> Trajectory:
            return Trajectory(messages_and_choices=[{"role": "user", "content": "?"}, choice([1], [2])], **given)

        yield SimpleNamespace(trajectory=trajectory, environment=lambda: {"OPENAI_API_KEY": "ls-1"})
        self.ended += 1


def section(folder: str, **options) -> TaskSection:
    return TaskSection(environment=f"harbor:{folder}", steps=1, options=options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The example's tasks, to be changed."""
    shutil.copytree(examples_folder() / "harbor", tmp_path / "harbor")
    return tmp_path / "harbor"


@pytest.fixture(autouse=True)
def _namespaces():
    try:
        sandboxes.check_local()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("agent", "rewards"),
    [
        pytest.param("true", {"count": 0.0, "greet": 0.0}, id="idle"),
        pytest.param("echo $INSTRUCTION > greeting.txt; cat list.txt | wc -l > count.txt", {"count": 1.0, "greet": 0.5}, id="half"),
        pytest.param("echo 1 > /logs/verifier/reward.txt; mkdir -p /tests; echo 'echo 1 > /logs/verifier/reward.txt' > /tests/test.sh",
            {"count": 0.0, "greet": 0.0}, id="forged"),
        pytest.param("(while :; do echo hello >> greeting.txt; sleep 1; done)& sleep 1", {"count": 0.0, "greet": 1.0}, id="background"),
    ],
)  # fmt: skip
async def test_the_tests_decide_whatever_the_agent_leaves(folder, agent, rewards):
    task = task_of(section("tasks", agent=agent), folder)
    assert [scenario.name for scenario in task.scenarios] == ["count", "greet"]
    served = Served()
    trajectories = {each.name: await task.rollout(served, each, 1.0) for each in task.scenarios}
    assert {name: trajectory.reward for name, trajectory in trajectories.items()} == rewards
    assert trajectories["count"].metrics["written"] == (rewards["count"] > 0)
    assert served.ended == 2


async def test_a_sandbox_has_its_own_folders_and_leaves_nothing(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    box = LocalSandbox(tmp_path / "box", "/app", {"COLOUR": "red"})
    said = await box.run(
        f"echo $COLOUR $HOME; pwd; ls /app /tmp /root | wc -w; ps -e | wc -l; cat {outside}; touch /usr/x; touch /etc/x",
        {},
        20,
    )
    assert said.output.startswith("red /root\n/app\n")
    assert "mine" not in said.output
    assert not Path("/usr/x").exists()
    assert not Path("/etc/x").exists()
    assert said.code == 1
    await box.run("echo kept > /app/a; ln -s /etc /app/link; sleep 600 & disown", {}, 20)
    assert (await box.run("cat a; python3 -c 'print(6 * 7)'", {}, 20)).output == "kept\n42\n"
    slow = await box.run("echo begun; sleep 600", {}, 5.0)
    assert (slow.code, slow.output) == (None, "begun\n")
    assert "sleep 600" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    long = await box.run("head -c 5000000 /dev/zero | tr '\\0' x", {}, 20)
    assert len(long.output) < 500_000
    await box.run("rm -rf /tests; ln -s /etc /logs/link", {}, 20)
    with pytest.raises(EnvironmentFailedError, match="leads out of the sandbox"):
        await box.bring(tmp_path / "box", "/logs/link/harbor")
    await box.close()
    assert not (tmp_path / "box").exists()
    assert outside.read_text() == "mine"


async def test_what_fails_is_a_failed_rollout_with_its_output(folder):
    (folder / "tasks/greet/tests/test.sh").write_text("echo the scorer broke >&2; exit 3")
    (folder / "tasks/count/environment/Dockerfile").write_text("FROM a\nRUN echo building && exit 4")
    task = task_of(section("tasks", agent="true"), folder)
    attempts = [[task.rollout(Served(), scenario, 1.0)] for scenario in task.scenarios]
    built, scored = await gather_trajectory_groups(attempts, max_exceptions=2, progress=False)
    assert "RUN echo building && exit 4 failed in a local sandbox" in built.exceptions[0].message
    assert scored.exceptions[0].message == "greet: the tests wrote no reward to /logs/verifier: the scorer broke"
    assert "the scorer broke" in scored.exceptions[0].traceback
    task = task_of(section("tasks", agent="echo I am lost; exit 7"), folder)
    (group,) = await gather_trajectory_groups(
        [[task.rollout(Served(), task.scenarios[1], 1.0)]], max_exceptions=1, progress=False
    )
    assert group.exceptions[0].message == "greet: the agent ended with exit code 7: I am lost"


def test_what_cannot_be_run_is_named_before_anything_starts(folder):
    def said(**options) -> str:
        with pytest.raises(ConfigError) as error:
            task_of(section("tasks", **options), folder)
        return str(error.value)

    assert "has 2 tasks, and held_out = 2" in said(held_out=2)
    assert "agent_files = 'nowhere' is no folder" in said(agent_files="nowhere")
    (folder / "tasks/greet/environment/Dockerfile").write_text("FROM a\nADD http://x /app\n")
    assert "a local sandbox has no ADD http://x /app" in said()
    (folder / "tasks/greet/task.toml").write_text("[agent]\ntimeout_sec = -1\n")
    assert "timeout_sec = -1 is no number of seconds" in said()
    (folder / "tasks/greet/instruction.md").unlink()
    assert "has no instruction.md" in said()
    shutil.rmtree(folder / "tasks")
    assert "has no task" in said()


async def test_the_loop_gives_the_model_a_shell(tmp_path, monkeypatch):
    """A right call, malformed arguments, an unknown tool, and an end."""
    import openai

    calls = [
        ("bash", '{"command": "echo 41 > n; cat n"}'),
        ("bash", "{"),
        ("grep", '{"command": "x"}'),
        ("bash", '{"command": "exit 3"}'),
    ]
    asked: list[list[dict]] = []

    async def create(self, **request):
        asked.append(list(request["messages"]))
        number = len(asked) - 1
        called = (
            []
            if number >= len(calls)
            else [
                {
                    "id": f"c{number}",
                    "type": "function",
                    "function": dict(zip(("name", "arguments"), calls[number], strict=True)),
                }
            ]
        )
        message = {"role": "assistant", "content": "done", "tool_calls": called or None}
        return openai.types.chat.ChatCompletion.model_validate(
            {
                "id": "x",
                "created": 1,
                "model": "m",
                "object": "chat.completion",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            }
        )

    monkeypatch.setattr(openai.resources.chat.completions.AsyncCompletions, "create", create)
    box = LocalSandbox(tmp_path / "box", "/app", {})
    episode = SimpleNamespace(base_url="http://127.0.0.1:9/v1", api_key="k", model="m@0")
    await ShellAgent(episode, box, turns=9, reply_tokens=16, command_s=20).work("Write 41.", 60)
    results = [message["content"] for message in asked[-1] if message["role"] == "tool"]
    assert results == ["41\n", 'the arguments must be {"command": "..."}', "no tool 'grep'", "\n[exit code 3]"]
    assert len(asked) == 5
    await box.close()
