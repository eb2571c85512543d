"""A machine that has a Python and nothing of ours: an empty home, a virtual environment, and no variable of the shell's."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
NO_NETWORK = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""In front of a command: loopback is all that it has."""


def build(out: Path, source: Path = ROOT) -> tuple[Path, Path]:
    """(wheel, sdist) of a source tree."""
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, "-m", "uv", "build", "--quiet", "--python", sys.executable, "--out-dir", str(out)]
    subprocess.run(command, cwd=source, env=environment, check=True, timeout=300)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def can_cut_off_the_network() -> bool:
    return subprocess.run([*NO_NETWORK, "true"], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Phase:
    """wall, cpu: seconds; cpu is user and system time of all processes of the command.
    output: stdout and stderr.
    """

    wall: float
    cpu: float
    output: str


class BareMachine:
    """python: a base interpreter. offline: commands reach no network, and pip has no settings."""

    def __init__(self, folder: Path, python: str, offline: bool = False) -> None:
        self.folder, self.offline = folder, offline
        self.home, self.work, self.bin = folder / "home", folder / "work", folder / "env" / "bin"
        self.home.mkdir(parents=True)
        self.work.mkdir()
        self._temporary = tempfile.mkdtemp(prefix="bare-", dir="/tmp")  # a short path, for sockets
        self.run(python, "-m", "venv", folder / "env")

    def close(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def run(self, *command: str | Path, timeout: float = 3000) -> Phase:
        """Fails with the command's output."""
        words = [*(NO_NETWORK if self.offline else ()), *map(str, command)]
        start, used = time.monotonic(), _cpu()
        result = subprocess.run(
            words, cwd=self.work, env=self._environment(), capture_output=True, text=True, timeout=timeout, check=False
        )
        output = result.stdout + result.stderr
        assert result.returncode == 0, f"{' '.join(words)}\n{output[-6000:]}"
        return Phase(time.monotonic() - start, _cpu() - used, output)

    def lockstep(self, *arguments: str | Path, timeout: float = 3000) -> Phase:
        return self.run(self.bin / "lockstep", *arguments, timeout=timeout)

    def pip(self, *arguments: str | Path) -> Phase:
        return self.run(self.bin / "python", "-m", "pip", "--disable-pip-version-check", *arguments)

    def _environment(self) -> dict[str, str]:
        """How a network is reached is the machine's: pip's settings, certificates, proxies."""
        network = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("PIP_") or name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR")
        }
        own = {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "TMPDIR": self._temporary,
            "COLUMNS": "120",
            "LANG": "C.UTF-8",
        }
        return own | ({"PIP_CONFIG_FILE": os.devnull} if self.offline else network)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
