"""`environment = "harbor:FOLDER"`: Harbor task folders, in a sandbox of this machine or in Docker.

An attempt goes as Harbor's own: the environment is made, the agent works, then the tests are brought and write the reward.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lockstep.config.base import Config
from lockstep.errors import ConfigError
from lockstep.loop.environments.harbor_folder import HarborTask, read_tasks
from lockstep.loop.environments.options import options_of
from lockstep.loop.environments.sandbox import DockerSandbox, LocalSandbox, Ran, Sandbox, check_local, docker
from lockstep.loop.environments.shell_agent import ShellAgent
from lockstep.loop.environments.worker import EnvironmentFailedError
from lockstep.loop.task import Task

if TYPE_CHECKING:
    from lockstep.gateway.episode import Episode
    from lockstep.loop.run_file import TaskSection
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import Trajectory

_REWARD = "cat /logs/verifier/reward.txt 2>/dev/null || cat /logs/verifier/reward.json"


class HarborOptions(Config):
    """[task.options] of Harbor's task folders."""

    sandbox: Literal["local", "docker"] = Field(
        default="local",
        description="local: namespaces of this Linux machine, with its programs; docker: the task's own image",
    )
    agent: str | None = Field(
        default=None,
        description="command of an agent that runs in the sandbox and reads OPENAI_* or ANTHROPIC_* and INSTRUCTION; not given: "
        "a loop that gives the model a shell as its one tool",
    )
    agent_files: str | None = Field(
        default=None,
        description="folder beside the config with the agent's own files, which are at /home/agent in the sandbox",
    )
    turns: int = Field(default=20, gt=0, description="replies of the loop, at most")
    reply_tokens: int = Field(default=1024, gt=0, description="tokens of a reply of the loop, at most")
    command_s: float = Field(default=30.0, gt=0, description="seconds of a command of the loop, at most")
    held_out: int = Field(default=0, ge=0, description="tasks at the end that are evaluated, and never trained on")
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="settings of every request beside the temperature, such as top_p"
    )


def task(name: str, section: TaskSection, folder: Path) -> Task:
    """The task of a folder of Harbor tasks. name: the folder, relative to the config's."""
    options = options_of(HarborOptions, section)
    place = folder / name
    tasks = read_tasks(place)
    if len(tasks) <= options.held_out:
        raise ConfigError(f"harbor:{name} has {len(tasks)} tasks, and held_out = {options.held_out}: none is left")
    if options.agent_files is not None and not (folder / options.agent_files).is_dir():
        raise ConfigError(f"[task.options] agent_files = {options.agent_files!r} is no folder beside the config")
    if options.sandbox == "local":
        check_local()
        for each in tasks:
            _check_build(each)
    elif shutil.which("docker") is None:
        raise ConfigError('sandbox = "docker" needs the command docker')

    async def rollout(model: TrainableModel, scenario: HarborTask, temperature: float) -> Trajectory:
        sampling = {**options.sampling, "temperature": temperature}
        with model.episode(sampling=sampling) as episode:
            sandbox = await _sandbox(scenario, options.sandbox)
            try:
                if options.agent_files is not None:
                    await sandbox.bring(folder / options.agent_files, "/home/agent")
                await _agent(episode, scenario, options, sandbox)
                reward, metrics = await _verified(scenario, sandbox)
            finally:
                await sandbox.close()
            return episode.trajectory(reward=reward, metrics=metrics, metadata={"task": scenario.name})

    training = tasks[: len(tasks) - options.held_out]
    return Task(place, training, rollout, None, tasks[len(training) :])


async def _agent(episode: Episode, scenario: HarborTask, options: HarborOptions, sandbox: Sandbox) -> None:
    """Let the agent work until it ends or its time is over. Raises EnvironmentFailedError for one that fails."""
    if options.agent is None:
        agent = ShellAgent(episode, sandbox, options.turns, options.reply_tokens, options.command_s)
        await agent.work(scenario.instruction, scenario.agent_s)
        return
    env = {**episode.environment(), "INSTRUCTION": scenario.instruction}
    done = await sandbox.run(options.agent, env, scenario.agent_s)
    if done.code not in (0, None):
        raise _failed(f"{scenario.name}: the agent ended with exit code {done.code}", done)


async def _verified(scenario: HarborTask, sandbox: Sandbox) -> tuple[float, dict[str, float]]:
    """What the tests wrote. Raises EnvironmentFailedError with their output where that is no reward."""
    await sandbox.bring(scenario.folder / "tests", "/tests")
    prepared = "rm -rf /logs/verifier && mkdir -p /logs/verifier && bash /tests/test.sh"
    done = await sandbox.run(prepared, scenario.verifier_env, scenario.verifier_s)
    if done.code is None:
        raise _failed(f"{scenario.name}: the tests took more than {scenario.verifier_s:g} s", done)
    written = await sandbox.run(_REWARD, {}, scenario.verifier_s)
    try:
        return _reward(json.loads(written.output))
    except ValueError:
        raise _failed(f"{scenario.name}: the tests wrote no reward to /logs/verifier", done) from None


def _reward(said: Any) -> tuple[float, dict[str, float]]:
    """A number, or an object with `reward` or one number. Raises ValueError for anything else."""
    if isinstance(said, Mapping):
        metrics = {str(name): float(value) for name, value in said.items() if isinstance(value, (int, float))}
        if "reward" not in metrics and len(metrics) != 1:
            raise ValueError
        reward = metrics.get("reward", next(iter(metrics.values())))
    elif isinstance(said, (int, float)):
        reward, metrics = float(said), {}
    else:
        raise ValueError
    if not math.isfinite(reward):
        raise ValueError
    return reward, metrics


def _failed(what: str, done: Ran) -> EnvironmentFailedError:
    last = [line for line in done.output.strip().splitlines() if line][-1:]
    failed = EnvironmentFailedError(": ".join([what, *last]))
    failed.add_note(f"Its output:\n{done.output[-4000:]}")
    return failed


_IGNORED = ("FROM", "CMD", "ENTRYPOINT", "EXPOSE", "LABEL", "MAINTAINER", "STOPSIGNAL", "HEALTHCHECK", "SHELL", "USER")


def _check_build(scenario: HarborTask) -> None:
    """Raises ConfigError for what a local sandbox can't take from a Dockerfile."""
    for name, rest in scenario.build:
        if name not in (*_IGNORED, "WORKDIR", "COPY", "ENV", "RUN") or (name == "COPY" and rest.startswith("--")):
            raise ConfigError(
                f'{scenario.folder / "environment" / "Dockerfile"}: a local sandbox has no {name} {rest[:40]}: set sandbox = "docker"'
            )


async def _sandbox(scenario: HarborTask, kind: str) -> Sandbox:
    if kind == "docker":
        return await DockerSandbox.started(await _image(scenario), scenario.workdir)
    folder = Path(tempfile.mkdtemp(prefix="lockstep-harbor-"))
    env = dict(_variable(rest) for name, rest in scenario.build if name == "ENV")
    sandbox = LocalSandbox(folder / "sandbox", scenario.workdir, env)
    try:
        await _built(scenario, sandbox)
    except BaseException:
        await sandbox.close()
        raise
    return sandbox


def _variable(rest: str) -> tuple[str, str]:
    name, equals, value = rest.partition("=")
    if not equals:
        name, _, value = rest.partition(" ")
    return name.strip(), value.strip().strip("\"'")


async def _built(scenario: HarborTask, sandbox: LocalSandbox) -> None:
    """Follow the Dockerfile, on top of this machine's programs."""
    workdir = "/app"
    for name, rest in scenario.build:
        if name == "WORKDIR":
            workdir = str(Path(workdir) / rest)
            sandbox.path(workdir).mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, place = rest.split()
            for source in sources:
                _copied(scenario.folder / "environment" / source, sandbox.path(str(Path(workdir) / place)), place)
        elif name == "RUN":
            done = await sandbox.run(rest, {}, scenario.agent_s, workdir)
            if done.code != 0:
                raise _failed(
                    f'{scenario.name}: RUN {rest[:60]} failed in a local sandbox; sandbox = "docker" builds the image',
                    done,
                )


def _copied(source: Path, place: Path, said: str) -> None:
    if source.is_dir():
        shutil.copytree(source, place, dirs_exist_ok=True)
        return
    inside = place / source.name if said.endswith(("/", ".")) or place.is_dir() else place
    inside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, inside)


async def _image(scenario: HarborTask) -> str:
    """The task's image, built where it is not there yet."""
    if scenario.image is not None:
        return scenario.image
    digest = hashlib.sha256(str(scenario.folder.resolve()).encode()).hexdigest()[:12]
    tag = f"lockstep-harbor-{digest}"
    await docker(["docker", "build", "-q", "-t", tag, str(scenario.folder / "environment")])
    return tag
