"""A run that is killed and goes on ends with the bits of the undisturbed run (audit H1). Real parts, fp32 on a CPU."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from frozen_processes import below
from lockstep.models.tiny.write import write_tiny
from lockstep.runs.checkpoint import read_manifest

pytestmark = pytest.mark.server
STEPS = 3
DEADLINE_S = 240.0
TASK = """
import lockstep as ls

def scenarios():
    return [f"say {word}" for word in ("red", "green", "blue", "black", "white")]

async def rollout(model, scenario, temperature):
    kept = ls.Trajectory(messages_and_choices=[{"role": "user", "content": scenario}], reward=0.0)
    for _ in range(2):
        reply = await model.openai_client().chat.completions.create(
            model=model.inference_name(), messages=kept.messages, temperature=temperature, max_tokens=10
        )
        kept.messages_and_choices += [reply.choices[0], {"role": "user", "content": "more"}]
    words = "".join(choice.message.content for choice in kept.choices)
    kept.reward = float(len(set(words)) % 7)
    return kept
"""
CONFIG = """
mode = "{mode}"

[model]
name = "killed"
project = "tests"
base_model = "{base}"
lora = {{ rank = 8, alpha = 16 }}

[task]
file = "task.py"
steps = {steps}
groups_per_step = 2
group_size = 4
evaluate_every = 2
evaluate_scenarios = 2
seed = 11

[backend]
path = "{runs}"
max_model_len = 256
keep_newest = 10

[train]
learning_rate = 1e-2
max_steps_off_policy = {bound}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    return write_tiny("qwen3", tmp_path_factory.mktemp("base") / "tiny", seed=5, overrides=small)


class Command:
    """`lockstep train` (or another command) on the small run, in a folder of its own."""

    def __init__(self, folder: Path, base: Path, mode: str = "synchronous", bound: int = 0):
        folder.mkdir()
        (folder / "task.py").write_text(TASK)
        (folder / "run.toml").write_text(
            CONFIG.format(base=base, runs=folder / "runs", steps=STEPS, mode=mode, bound=bound)
        )
        self.folder, self.run = folder, folder / "runs" / "tests" / "killed"

    def start(self, verb: str = "train") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "lockstep.cli.main", verb, str(self.folder / "run.toml")]
        log = (self.folder / "output").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def finish(self, process: subprocess.Popen[bytes], last: int = STEPS) -> dict[int, bytes]:
        """The adapters by step, once the command has ended well."""
        assert process.wait(DEADLINE_S) == 0, (self.folder / "output").read_text()
        steps = sorted(int(path.name) for path in (self.run / "steps").iterdir())
        assert steps == list(range(last + 1))
        files = {step: self.run / "steps" / f"{step:04d}" / "adapter" / "adapter_model.safetensors" for step in steps}
        return {step: file.read_bytes() for step, file in files.items()}


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not reached():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.01)


def process_of(user: int, module: bytes) -> int:
    """The first process below the user's that runs a module as its program."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in below(user)}
    return next(pid for pid, words in commands.items() if [b"-m", module] in (words[1:3], words[2:4]))


@pytest.fixture(scope="module")
def undisturbed(runtime, base, tmp_path_factory):
    command = Command(tmp_path_factory.mktemp("undisturbed") / "a", base)
    return command.finish(command.start())


@pytest.mark.parametrize("server_too", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_h1_a_killed_run_ends_with_the_bits_of_the_undisturbed_one(undisturbed, base, tmp_path, server_too):
    """The user's process and the trainer's rank are killed in turn; a run that begins again has another server in any case."""
    assert len(set(undisturbed.values())) == STEPS + 1
    command = Command(tmp_path / "b", base)
    user = command.start()
    try:
        wait_for((command.run / "trajectories" / "train" / "0002.parquet").exists, user)
        user.kill()
        user.wait()
        user = command.start()
        wait_for((command.run / "steps" / "0002").exists, user)
        if server_too:
            os.kill(process_of(user.pid, b"vllm.entrypoints.openai.api_server"), signal.SIGKILL)
        wait_for((command.run / "trajectories" / "train" / "0003.parquet").exists, user)
        os.kill(process_of(user.pid, b"lockstep.engine.worker"), signal.SIGKILL)
        assert command.finish(user) == undisturbed
    finally:
        user.kill()


@pytest.mark.slow
def test_h1_two_undisturbed_runs_are_equal_bit_for_bit(undisturbed, base, tmp_path):
    command = Command(tmp_path / "c", base)
    assert command.finish(command.start()) == undisturbed


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pipeline_without_staleness_is_the_synchronous_loop_bit_for_bit(undisturbed, base, tmp_path, killed):
    """`max_steps_off_policy = 0`: the same draws, seeds, order and weights."""
    command = Command(tmp_path / "d", base, mode="pipeline")
    user = command.start()
    try:
        if killed:
            wait_for((command.run / "steps" / "0002").exists, user)
            user.kill()
            user.wait()
            user = command.start()
        assert command.finish(user) == undisturbed
    finally:
        user.kill()


@pytest.mark.slow
def test_a_pipeline_that_is_killed_anywhere_trains_every_group_once(runtime, base, tmp_path):
    """Killed twice, each time at a random moment after a step."""
    command = Command(tmp_path / "e", base, mode="pipeline", bound=2)
    user = command.start()
    try:
        for life in range(2):
            wait_for((command.run / "steps" / f"{life + 1:04d}").exists, user)
            time.sleep(random.uniform(0, 2))
            user.kill()
            user.wait()
            user = command.start()
        command.finish(user)
    finally:
        user.kill()
    states = [read_manifest(command.run / "steps" / f"{n:04d}")["state"]["pipeline"] for n in range(1, STEPS + 1)]
    counted = Counter(each["position"] for state in states for each in state["trained"])
    assert set(counted.values()) == {1}
    assert counted.total() == 2 * STEPS
