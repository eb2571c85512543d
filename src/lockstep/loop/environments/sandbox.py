"""Where an agent's commands run: a process that sees the machine's programs and folders of its own, or a Docker container.

The local sandbox is made of Linux namespaces. Commands see `/` without what may be written there, the home folders and /tmp.
They see no other process, and what they start ends with them. They share the machine's network, and can read any file
that its user can read outside of the home folders: run agents that you don't trust in Docker.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from lockstep.config import deadlines
from lockstep.errors import ConfigError
from lockstep.loop.environments.worker import EnvironmentFailedError

_KEPT = 200_000
"""Bytes of a command's output; the middle of a longer one is left out."""
OWN = ("app", "tests", "logs", "tmp", "root", "home", "workspace")
"""Folders below `/` that each local sandbox has for itself."""
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--ipc", "--fork")
_ENTER = """
set -e
root=$1 own=$2 user=$3 workdir=$4; shift 4
mount -t tmpfs lockstep "$root"
for path in /*; do
  name=${path#/}
  if [ -d "$own/$name" ] || [ "$name" = proc ]; then continue; fi
  if [ -L "$path" ]; then cp -P "$path" "$root/$name"; continue; fi
  [ -d "$path" ] || continue
  mkdir "$root/$name"
  mount --rbind "$path" "$root/$name"
  [ "$name" = dev ] || mount -o remount,bind,ro "$root/$name"
done
for path in "$own"/*; do mkdir "$root/${path##*/}"; mount --bind "$path" "$root/${path##*/}"; done
mkdir "$root/proc"; mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
IFS=:; for path in $user; do mkdir -p "$root$path"; mount --bind "$path" "$root$path"; mount -o remount,bind,ro "$root$path"; done
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$workdir" "$@"
"""


@dataclass(frozen=True)
class Ran:
    """A command's end. code: None where its time was over. output: both of its streams."""

    code: int | None
    output: str


class Sandbox(Protocol):
    """A file system and its commands, for one attempt."""

    async def run(self, command: str, env: Mapping[str, str], limit_s: float, workdir: str | None = None) -> Ran: ...
    async def bring(self, folder: Path, place: str) -> None:
        """The folder's files at this place, where nothing else is left."""
        ...

    async def close(self) -> None: ...


async def ran(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Ran:
    """A command in a process group of its own, which ends with it."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    kept = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            assert process.stdout is not None
            while part := await process.stdout.read(1 << 16):
                kept += part
                if len(kept) > 2 * _KEPT:
                    kept[_KEPT // 2 : -_KEPT // 2] = b"\n[...]\n"
            code = await process.wait()
    except TimeoutError:
        code = None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return Ran(code, kept.decode(errors="replace"))


class LocalSandbox:
    """Namespaces of Linux around each command; files stay from one to the next, processes do not.

    folder: empty, for the sandbox's own files. env: of every command.
    """

    def __init__(self, folder: Path, workdir: str, env: Mapping[str, str]):
        self._root, self._own, self._workdir = folder / "root", folder / "own", workdir
        path = os.pathsep.join([f"{sys.prefix}/bin", os.environ.get("PATH", os.defpath)])
        self._env = {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", **env}
        self._folder = folder
        self._root.mkdir(parents=True)
        for name in OWN:
            (self._own / name).mkdir(parents=True)
        (self._own / "tmp").chmod(0o1777)
        self.path(workdir).mkdir(parents=True, exist_ok=True)

    def path(self, place: str) -> Path:
        """Where a place of the sandbox lies outside. Raises ConfigError for one that it does not have for itself."""
        parts = Path(os.path.normpath(place)).parts
        if len(parts) < 2 or parts[0] != "/" or parts[1] not in OWN:
            raise ConfigError(
                f"{place} lies outside of {', '.join(f'/{name}' for name in OWN)}, which a local sandbox has for itself: "
                'set sandbox = "docker"'
            )
        return self._own.joinpath(*parts[1:])

    async def run(self, command: str, env: Mapping[str, str], limit_s: float, workdir: str | None = None) -> Ran:
        paths = [str(self._root), str(self._own), ":".join(_programs()), workdir or self._workdir]
        inside = [*_UNSHARE, "--kill-child", "--", "/bin/sh", "-c", _ENTER, "enter", *paths, "/bin/bash", "-c", command]
        return await ran(inside, limit_s, {**self._env, **env})

    async def bring(self, folder: Path, place: str) -> None:
        there = self.path(place)
        parent = os.path.realpath(there.parent)
        if not Path(parent).is_relative_to(os.path.realpath(self._own)):
            raise EnvironmentFailedError(f"{place} leads out of the sandbox")
        if there.parent == self._own:  # mounted as it is
            for each in there.iterdir():
                _remove(each)
        else:
            _remove(there)
        await asyncio.to_thread(shutil.copytree, folder, there, symlinks=True, dirs_exist_ok=True)

    async def close(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@cache
def _programs() -> tuple[str, ...]:
    """Folders of programs that lie in a home folder, such as this Python's."""
    folders = [sys.prefix, sys.base_prefix, *os.environ.get("PATH", "").split(os.pathsep)]
    hidden = tuple(f"/{name}/" for name in OWN)
    return tuple(dict.fromkeys(path for path in folders if path.startswith(hidden) and Path(path).is_dir()))


def check_local() -> None:
    """Raises ConfigError where this machine lets nobody make namespaces."""
    command = [*_UNSHARE, "mount", "-t", "tmpfs", "t", "/mnt"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=deadlines.SANDBOX_S)
        said = "" if done.returncode == 0 else done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        raise ConfigError(f'a local sandbox needs namespaces of Linux for this user ({said}): set sandbox = "docker"')


class DockerSandbox:
    """A container of the task's image, removed at the end."""

    def __init__(self, container: str, workdir: str):
        self._container, self._workdir = container, workdir

    @classmethod
    async def started(cls, image: str, workdir: str) -> DockerSandbox:
        """The container uses the machine's network, where the gateway is."""
        command = ["docker", "run", "-d", "--rm", "--network", "host", image, "sleep", "infinity"]
        return cls((await docker(command)).split()[-1], workdir)

    async def run(self, command: str, env: Mapping[str, str], limit_s: float, workdir: str | None = None) -> Ran:
        settings = [part for name, value in env.items() for part in ("-e", f"{name}={value}")]
        limited = ["timeout", "-k", "1", str(limit_s), "bash", "-c", command]
        place = ["-w", workdir or self._workdir]
        done = await ran(
            ["docker", "exec", *settings, *place, self._container, *limited], limit_s + deadlines.SANDBOX_S
        )
        return Ran(None if done.code in (124, 137) else done.code, done.output)

    async def bring(self, folder: Path, place: str) -> None:
        there = shlex.quote(place)
        await self.run(f"rm -rf {there} && mkdir -p {there}", {}, deadlines.SANDBOX_S, "/")
        await docker(["docker", "cp", f"{folder}/.", f"{self._container}:{place}"])

    async def close(self) -> None:
        await ran(["docker", "rm", "-f", self._container], deadlines.SANDBOX_S)


async def docker(command: Sequence[str]) -> str:
    """The output of a Docker command. Raises EnvironmentFailedError with it if the command fails."""
    done = await ran(command, deadlines.DOCKER_S, dict(os.environ))
    if done.code != 0:
        raise EnvironmentFailedError(f"{' '.join(command[:2])} failed: {done.output.strip()[-2000:]}")
    return done.output
