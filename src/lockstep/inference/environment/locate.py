"""The isolated vLLM environments on this machine, and which of them is usable.

`$LOCKSTEP_HOME/runtimes/<kind>-<key>/` holds one environment per lock file and Python version, side
by side. It counts only with its marker `installed.json`, which is written last; `plugins/<digest>/`
in it holds the `lockstep-vllm` package of one source state.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lockstep.errors import ConfigError, RuntimeNotInstalledError
from lockstep.process.child import lockstep_home

Kind = Literal["cpu", "cuda"]
KINDS: tuple[Kind, ...] = ("cpu", "cuda")
MARKER = "installed.json"
PYTHON_VARIABLE = "LOCKSTEP_RUNTIME_PYTHON"


@dataclass(frozen=True)
class Runtime:
    """A usable vLLM environment. `plugin_path` goes on the server's PYTHONPATH.

    `folder` is None for one we don't manage.
    """

    kind: Kind
    python: Path
    plugin_path: Path
    folder: Path | None


@dataclass(frozen=True)
class EnvironmentStatus:
    """One environment on disk, as `lockstep runtime status` shows it."""

    kind: str
    key: str
    folder: Path
    complete: bool
    current: bool
    """It is the one that this version of Lockstep and this Python use."""
    size_bytes: int
    python_version: str
    """Empty while incomplete."""


@dataclass(frozen=True)
class Source:
    """The `runtime/` folder: locks and the plugin's sources."""

    folder: Path

    def lock(self, kind: Kind) -> Path:
        path = self.folder / "locks" / f"{kind}.txt"
        if not path.is_file():
            raise ConfigError(f"no lock file for the {kind} runtime at {path}: expected one of {', '.join(KINDS)}")
        return path

    def torch_lock(self, kind: Kind) -> Path | None:
        """Requirements installed before the lock, with their dependencies: builds that differ in
        hash.
        """
        path = self.folder / "locks" / f"{kind}-torch.txt"
        return path if path.is_file() else None

    def key(self, kind: Kind) -> str:
        """Names an environment: lock contents, Python version, platform."""
        digest = hashlib.sha256(self.lock(kind).read_bytes())
        torch_lock = self.torch_lock(kind)
        if torch_lock is not None:
            digest.update(torch_lock.read_bytes())
        digest.update(f"{platform.python_version()} {sys.platform} {platform.machine()}".encode())
        return digest.hexdigest()[:16]

    def plugin_digest(self) -> str:
        """Names a state of the plugin's sources."""
        digest = hashlib.sha256()
        sources = sorted(path for folder in ("src", "startup") for path in (self.folder / folder).rglob("*.py"))
        files = [self.folder / "pyproject.toml", *sources]
        for path in files:
            digest.update(path.relative_to(self.folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]


def runtime_source() -> Source:
    """The `runtime/` folder of a source checkout, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "_runtime", package.parents[1] / "runtime"):
        if (folder / "pyproject.toml").is_file() and (folder / "locks").is_dir():
            return Source(folder)
    raise RuntimeNotInstalledError(f"the lockstep-vllm sources are missing beside {package}: reinstall lockstep-rl")


MANIFEST = "manifest.json"


def check_source(source: Source) -> None:
    """Raise RuntimeNotInstalledError where a file of an installed wheel's runtime is missing or
    changed. A source checkout has no manifest.
    """
    manifest = source.folder / MANIFEST
    if not manifest.is_file():
        return
    for name, digest in json.loads(manifest.read_text()).items():
        file = source.folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            state = "changed" if file.is_file() else "missing"
            raise RuntimeNotInstalledError(f"{file} is {state} since {name} was packed: reinstall lockstep-rl")


def default_kind() -> Kind:
    """`cuda` where an NVIDIA driver is loaded, else `cpu`."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def checked_kind(kind: str | None) -> Kind:
    """The kind asked for, or the one this machine needs. Raises ConfigError for an unknown one."""
    if kind is None:
        return default_kind()
    for known in KINDS:
        if kind == known:
            return known
    raise ConfigError(f"unknown runtime kind {kind!r}: expected one of {', '.join(KINDS)}")


def environments_folder() -> Path:
    return lockstep_home() / "runtimes"


def environment_folder(source: Source, kind: Kind) -> Path:
    """The path of the environment for this lock and this Python, present or not."""
    return environments_folder() / f"{kind}-{source.key(kind)}"


def environment_python(folder: Path) -> Path:
    return folder / "bin" / "python"


def is_complete(folder: Path) -> bool:
    """Only the marker counts: it is written when everything else is in place."""
    return (folder / MARKER).is_file()


def status(source: Source | None = None) -> list[EnvironmentStatus]:
    """Every environment on disk, this version's own first."""
    source = source or runtime_source()
    current = {
        environment_folder(source, kind) for kind in KINDS if (source.folder / "locks" / f"{kind}.txt").is_file()
    }
    root = environments_folder()
    entries = (
        [_status(folder, folder in current) for folder in sorted(root.iterdir()) if folder.is_dir()]
        if root.is_dir()
        else []
    )
    return sorted(entries, key=lambda entry: not entry.current)


def _status(folder: Path, current: bool) -> EnvironmentStatus:
    kind, _, key = folder.name.rpartition("-")
    complete = is_complete(folder)
    try:
        marker = json.loads((folder / MARKER).read_text()) if complete else {}
    except ValueError:
        raise RuntimeNotInstalledError(
            f"{folder / MARKER} is damaged: delete the folder and run `lockstep runtime install`"
        ) from None
    return EnvironmentStatus(kind, key, folder, complete, current, folder_bytes(folder), marker.get("python", ""))


def folder_bytes(folder: Path) -> int:
    """Disk use of a folder in bytes, links not followed."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            total += os.lstat(os.path.join(parent, name)).st_size
    return total
