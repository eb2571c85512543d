"""The doctor finds each planted fault, with its remedy, and nothing else that is wrong."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lockstep.cli.doctor.facts import Facts, Gpu, gather
from lockstep.cli.doctor.findings import Finding, exit_code, findings
from lockstep.cli.doctor.leftovers import Leftover, leftovers
from lockstep.cli.main import app
from lockstep.inference.environment.locate import EnvironmentStatus
from lockstep.process import guard

WELL = Facts(
    system="Linux",
    machine="x86_64",
    python=(3, 12, 1),
    cores=16,
    memory=64 << 30,
    shared_memory=16 << 30,
    disk=500 << 30,
    home=Path("/tmp"),
    temporary=Path("/tmp"),
    open_files=65536,
    processes=65536,
    packages={"torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.19.0"},
    torch_cuda="13.0",
    runtimes=(EnvironmentStatus("cuda", "key", Path("/tmp/cuda-key"), True, True, 9 << 30, "3.12.1"),),
    kind="cuda",
    driver="580.95.05",
    gpus=(Gpu("H200", 140 << 30, 139 << 30),),
)

PLANTED: dict[str, tuple[dict, str, str]] = {
    "macOS": ({"system": "Darwin"}, "need Linux", "Train on a Linux machine"),
    "little memory": ({"memory": 1 << 30}, "GB of memory are free", "End other programs"),
    "old Python": ({"python": (3, 10, 4)}, "Python 3.10.4", "3.11, 3.12 or 3.13"),
    "Windows": ({"system": "Windows"}, "need Linux", "wsl --install"),
    "no compiler": ({"compiler": False}, "no C++ compiler", "apt-get install g++"),
    "home that can't be written": (
        {"home_problem": "Permission denied"},
        "Permission denied",
        "Set LOCKSTEP_HOME to a folder",
    ),
    "few processes": ({"processes": 200}, "200 processes and threads", "ulimit -u 65536"),
    "damaged wheel": (
        {"runtime_problem": "locks/cpu.txt is changed"},
        "is changed",
        "pip install --force-reinstall lockstep-rl",
    ),
    "leftover": (
        {"leftovers": (Leftover(77, "guard 77 of process 5 is stopped"),)},
        "is stopped",
        "kill -CONT 77; kill 77",
    ),
    "no trainer": ({"packages": {}}, "can't train", "pip install lockstep-rl[train]"),
    "vllm beside the trainer": (
        {"packages": WELL.packages | {"vllm": "0.32"}},
        "vllm is installed",
        "pip uninstall vllm",
    ),
    "full disk": ({"disk": 1 << 30}, "1.1 GB free", "Free 5 GB"),
    "home on NFS": ({"home_network": "nfs4"}, "network file system", "LOCKSTEP_HOME to a local disk"),
    "small /dev/shm": ({"shared_memory": 64 << 20}, "/dev/shm", "--shm-size 8g"),
    "long TMPDIR": ({"temporary": None}, "too long for sockets", "Set TMPDIR to a shorter path"),
    "few open files": ({"open_files": 256}, "256 files may be open", "ulimit -n 65536"),
    "CPU torch on a GPU machine": ({"torch_cuda": ""}, "is a CPU build", "pip install --force-reinstall torch"),
    "old driver": ({"driver": "535.10"}, "too old for CUDA 13.0", "Install driver 580"),
    "hidden GPUs": ({"visible_gpus": ""}, "hides all GPUs", "unset CUDA_VISIBLE_DEVICES"),
    "used GPU": ({"gpus": (Gpu("H200", 140 << 30, 20 << 30),)}, "GPU 0 has 21 of 150 GB free", "End what uses it"),
    "broken driver": (
        {"gpu_problem": "couldn't communicate with the NVIDIA driver", "gpus": ()},
        "communicate",
        "Check the driver",
    ),
    "no runtime": ({"runtimes": ()}, "is not installed", "lockstep runtime install --kind cuda"),
    "interrupted installation": (
        {"runtimes": (replace(WELL.runtimes[0], complete=False),)},
        "was interrupted",
        "lockstep runtime install --kind cuda",
    ),
    "another version's runtime": (
        {"runtimes": (*WELL.runtimes, replace(WELL.runtimes[0], current=False))},
        "another version's server environment",
        "rm -r /tmp/cuda-key",
    ),
    "runtime of one's own": (
        {"runtime_python": "/nowhere/python"},
        "LOCKSTEP_RUNTIME_PYTHON=/nowhere/python",
        "or unset it",
    ),
}


def wrong(listed: list[Finding]) -> list[Finding]:
    return [finding for finding in listed if finding.level != "ok"]


def test_a_machine_that_is_well():
    assert wrong(findings(WELL)) == []
    assert exit_code(findings(WELL)) == 0


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_the_only_finding_and_has_a_remedy(fault, tmp_path):
    fields, says, remedy = PLANTED[fault]
    if fault == "long TMPDIR":
        fields = {"temporary": tmp_path / ("long" * 20)}
        fields["temporary"].mkdir()
    (finding,) = wrong(findings(replace(WELL, **fields)))
    assert says in finding.says
    assert remedy in finding.remedy


def test_this_machine_with_a_home_that_is_a_file(tmp_path, monkeypatch):
    """Gathered for real: the home can't be written, and so no runtime is there."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "file"))
    says = [finding.says for finding in wrong(findings(gather()))]
    assert any("File exists" in line or "Not a directory" in line for line in says)
    assert any("is not installed" in line for line in says)


def test_this_machine_with_an_interrupted_installation(tmp_path, monkeypatch):
    from lockstep.inference.environment.locate import default_kind, environment_folder, runtime_source

    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path))
    monkeypatch.delenv("LOCKSTEP_RUNTIME_PYTHON", raising=False)
    folder = environment_folder(runtime_source(), default_kind())
    folder.mkdir(parents=True)
    (finding,) = [finding for finding in wrong(findings(gather())) if finding.topic == "runtime"]
    assert str(folder) in finding.says
    assert finding.remedy.startswith("lockstep runtime install")


def test_this_machine_with_few_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        says = [finding.says for finding in wrong(findings(gather()))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "300 files may be open" in says


@pytest.fixture
def guarded() -> Iterator[Callable[[int], subprocess.Popen]]:
    """A process whose command line is a guard's of the given parent."""
    children = []

    def start(parent: int) -> subprocess.Popen:
        command = [sys.executable, "-c", "import time; time.sleep(60)", guard.__file__, str(parent)]
        children.append(subprocess.Popen(command))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()


def test_a_guard_without_its_parent_and_one_that_stands_still(guarded):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    before = {process.pid for process in leftovers()}
    orphan, stopped, well = guarded(gone.pid), guarded(os.getpid()), guarded(os.getpid())
    stopped.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while {process.pid for process in leftovers()} - before != {orphan.pid, stopped.pid}:
        assert time.monotonic() < deadline, (leftovers(), well.pid)
        time.sleep(0.05)
    stopped.send_signal(signal.SIGCONT)


def test_the_command_speaks_json(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    said = json.loads(result.output)
    assert result.exit_code == 1  # no runtime in there
    assert {"level", "topic", "says", "remedy"} == set(said["findings"][0])
    assert said["facts"]["home"] == str(tmp_path)
    shown = CliRunner().invoke(app, ["doctor"])
    assert "lockstep runtime install" in shown.output
