"""Child processes that can't outlive this one: each runs under `lockstep.process.guard`, in a
process group of its own.

Works from any thread and under asyncio: nothing here depends on the thread that started the child.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockstep.process import guard
from lockstep.process.scratch import remove_abandoned

# What a child may see of our environment. PYTHONPATH, PYTHONHOME, VIRTUAL_ENV and the like are not
# here on purpose: they would pull modules of this environment into another one.
_PASSED = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TMP", "TEMP", "TZ", "TERM", "LANG", "LANGUAGE",
        "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "CC", "CXX",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
        "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
        "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS", "XDG_DATA_HOME",
        "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "TILELANG_CACHE_DIR",
        "LOCKSTEP_HOME",
    }
)  # fmt: skip
_PASSED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "HF_", "HUGGINGFACE_", "OMP_", "MKL_")
_INSTALL_PREFIXES = ("PIP_", "UV_")
_SECRETS = ("TOKEN", "SECRET", "PASSWORD")
"""In the names of what no child needs: this process downloads models itself."""
LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
"""Bytes of a Unix socket's path."""


# What compilers keep for the next process, by the environment variable that says where. Each keys
# its entries by versions, device and source, so that trainers and servers of all runs may share
# them.
_COMPILER_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "torch",
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
    "VLLM_CACHE_ROOT": "vllm",
}


def lockstep_home() -> Path:
    """`$LOCKSTEP_HOME`, or `~/.cache/lockstep`."""
    configured = os.environ.get("LOCKSTEP_HOME")
    return Path(configured).expanduser().absolute() if configured else Path.home() / ".cache" / "lockstep"


def child_env(extra: Mapping[str, str] | None = None, *, installer: bool = False) -> dict[str, str]:
    """Environment of a child: an allow-list of ours, then `extra`.

    Compilers keep their results below `lockstep_home()`, so that a second run starts warm; a
    child's own TMPDIR is deleted with the child. Tokens and passwords stay here.

    installer: also pass pip's and uv's settings, passwords included.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED
        or (name.startswith(_PASSED_PREFIXES) and not any(secret in name for secret in _SECRETS))
        or (installer and name.startswith(_INSTALL_PREFIXES))
    }
    compiled = {name: str(lockstep_home() / "compiled" / folder) for name, folder in _COMPILER_CACHES.items()}
    return compiled | kept | dict(extra or {})


def seen_gpus() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process, by number or UUID; None: it says
    nothing, all of them.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    end = next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))
    return names[:end]


def visible_gpus(numbers: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a child that gets these GPUs, counted among those that this process
    may use; none hides all.
    """
    seen = seen_gpus()
    return ",".join(str(number) if seen is None else seen[number] for number in numbers)


class Child:
    """A command that runs under its guard. `pid` is the guard's; its end means that the whole tree
    is gone.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log_path: Path, log_start: int = 0) -> None:
        """log_start: bytes of the log that others wrote before."""
        self.name = name
        self._log_start = log_start
        self.pid = process.pid
        self.log_path = log_path
        self._process = process

    def poll(self) -> int | None:
        """Exit status (128 + N after signal N), or None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int:
        """Waits for the end of the whole tree. Raises TimeoutError, which names the child, after
        `timeout` seconds.
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} (guard process {self.pid}) still runs after {timeout:g} s") from None

    def terminate(self, grace_s: float = 10.0) -> int:
        """SIGTERM, then SIGKILL to the whole tree after `grace_s` seconds; returns the exit status.

        Harmless when it has ended.
        """
        pipe = self._process.stdin
        assert pipe is not None
        # A broken or closed pipe: the guard has ended, or a second thread is terminating too. The
        # wait below sees both.
        with contextlib.suppress(BrokenPipeError, ValueError):
            pipe.write(b"terminate %g\n" % grace_s)
            pipe.flush()
        try:
            return self.wait(grace_s + 10.0)
        finally:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def kill(self) -> int:
        """SIGKILL to the whole tree, now; returns the exit status."""
        return self.terminate(0.0)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that it wrote to its log; those of an earlier child that wrote there are
        left out.
        """
        return tail(self.log_path, lines, self._log_start)


def tail(path: Path, lines: int, start: int = 0) -> str:
    """The last `lines` lines of a text file behind byte `start`, from its last 64 KiB at most.
    Empty if there is no such file.
    """
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            end = log.tell()
            log.seek(max(start if start <= end else 0, end - 65536))  # shorter than that: somebody emptied it
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def private_log(path: Path) -> int:
    """Opens a log for appending that only this user can read (0600 in a 0700 folder); returns the
    file descriptor.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def guarded(command: Sequence[str], removes: Sequence[Path] = ()) -> list[str]:
    """`command` under a guard, for a process whose standard input is a pipe that only this one
    holds.
    """
    options = [word for folder in removes for word in ("--remove", str(folder))]
    return [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *options, "--", *map(str, command)]


def spawn(
    command: Sequence[str],
    env: Mapping[str, str],
    log_path: Path,
    name: str,
    *,
    cwd: Path | None = None,
    removes: Sequence[Path] = (),
) -> Child:
    """Starts `command` under a guard, in a process group of its own, with exactly `env` and its
    output appended to `log_path`.

    Only TMPDIR is another one, the command's own. The tree dies when this process ends in any way,
    SIGKILL included, and leaves nothing in TMPDIR and no shared memory. The folders in `removes` go
    with the tree. Leftovers of a killed guard go now. A command that can't be started ends with
    status 127 and a line in the log.
    """
    remove_abandoned()
    log_fd = private_log(log_path)
    log_start = os.fstat(log_fd).st_size
    try:
        process = subprocess.Popen(
            guarded(command, removes),
            stdin=subprocess.PIPE,
            stdout=log_fd,
            stderr=log_fd,
            env=dict(env),
            cwd=cwd,
            # Not a session: Linux schedules each session as one (autogroup), and a server that
            # spins on every core would then keep this process from running for a second at a time.
            process_group=0,
        )
    finally:
        os.close(log_fd)
    return Child(name, process, log_path, log_start)
