"""Runs one command and takes its whole process tree down with itself or with the process that asked
for it.

Standard library only: it is started by path, `python -I -S guard.py`, from any interpreter.
Standard input is a pipe whose other end only the asking process holds. When that process is gone,
in whatever way, the pipe reads end-of-file, and the guard kills everything below it. A line
`terminate SECONDS` on the pipe asks for an orderly end: SIGTERM to the command's group, then
SIGKILL to the tree after that many seconds.

On Linux the guard is a child-subreaper: a process that left its session or lost its parent becomes
the guard's own child. So killing direct children until there are none reaches every descendant.
Only the guard reaps them, so no process id can have been recycled. The command gets SIGKILL from
the kernel if the guard itself is killed. Elsewhere only the command's process group is killed.

Nothing is left behind. The command's TMPDIR is a folder of its own, which the guard removes at the
end: killed processes leave sockets there. `--remove FOLDER` before `--` names one more. Folders of
a guard that was killed itself are known by their lock, which nobody holds any more: `scratch.py`
removes them. Resource trackers get up to 5 s to remove the shared memory of killed processes; only
a tracker that is still alive then is killed.

Exit status: the command's own, 128 + N after signal N, 127 if it could not be started.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

LINUX = sys.platform == "linux"
PREFIX = "lockstep-"
LOCK = ".lock"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# The pipe's end-of-file comes at once; the parent's id is looked at too, since a forked sibling may
# hold the pipe open.
_PARENT_CHECK_S = 0.25
_TICK_S = 0.02
_TRACKER_S = 5.0
"""A tracker needs milliseconds once it is alone. A tracker whose pipe somebody outside the tree
holds is killed.
"""


def main(argv: list[str]) -> int:
    end = argv.index("--")
    parent_pid, removed, command = int(argv[0]), argv[2:end:2], argv[end + 1 :]
    assert argv[1:end:2] == ["--remove"] * len(removed)
    assert command
    stop_signals: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the command would inherit
    signal.signal(signal.SIGTERM, lambda number, _: stop_signals.append(number))
    wakeup_fd = _signal_wakeup()
    if LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.ExitStack() as stack:
        for folder in removed:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            scratch, _ = locked_folder()  # locked until this process ends
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            child = _start(command, scratch)
        except OSError as error:
            sys.stderr.write(f"lockstep guard: can't start {command[0]}: {error}\n")
            return 127
        status = _watch(child.pid, parent_pid, wakeup_fd, stop_signals)
        _kill_all(child.pid)
    return 128 + status.signal if status.signal else status.code


def locked_folder() -> tuple[str, int]:
    """A new folder in TMPDIR for this user alone, and the descriptor of its lock. The folder is in
    use while the lock is open.
    """
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        path = os.path.join(folder, LOCK)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(lock).st_ino:
                return folder, lock
        except OSError:  # somebody cleared the folder away before it was locked
            pass
        os.close(lock)


def _start(command: list[str], scratch: str) -> subprocess.Popen[bytes]:
    """No other thread exists here, so that a function between fork and exec is safe."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": scratch},
        process_group=0,
        preexec_fn=die_with(os.getpid()),  # noqa: PLW1509
    )


class _Status:
    """The exit of the command."""

    def __init__(self, wait_status: int) -> None:
        code = os.waitstatus_to_exitcode(wait_status)
        self.signal = -code if code < 0 else 0
        self.code = max(code, 0)


def _watch(pid: int, parent_pid: int, wakeup_fd: int, stop_signals: list[int]) -> _Status:
    """Waits until the command ends, or ends it:

    at once when the parent is gone, after a grace when asked to terminate.
    """
    pending = b""
    deadline: float | None = None
    while True:
        status = _reap(pid)
        if status is not None:
            return status
        if stop_signals or os.getppid() != parent_pid or (deadline is not None and time.monotonic() >= deadline):
            return _killed(pid)
        timeout = _PARENT_CHECK_S if deadline is None else min(_PARENT_CHECK_S, max(0.0, deadline - time.monotonic()))
        readable, _, _ = select.select([0, wakeup_fd], [], [], timeout)
        if wakeup_fd in readable:
            os.read(wakeup_fd, 4096)
        if 0 in readable:
            chunk = os.read(0, 4096)
            if not chunk:
                return _killed(pid)
            pending += chunk
            *lines, pending = pending.split(b"\n")
            for line in lines:
                verb, _, seconds = line.partition(b" ")
                if verb == b"terminate" and deadline is None:
                    deadline = time.monotonic() + float(seconds)
                    if float(seconds) <= 0:
                        break
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGTERM)


def _reap(pid: int) -> _Status | None:
    """Reaps whatever ended, adopted orphans included; returns the command's status once it is among
    them.
    """
    while True:
        try:
            done, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return _Status(0)  # can't happen while the command is unreaped; without children there is nothing to guard
        if done == 0:
            return None
        if done == pid:
            return _Status(wait_status)


def _killed(pid: int) -> _Status:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return _Status(os.waitpid(pid, 0)[1])


def _kill_all(pid: int) -> None:
    """Kills every descendant. The command itself has ended and been reaped."""
    if not LINUX:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        return
    patience = time.monotonic() + _TRACKER_S
    while True:
        for child in _direct_children():
            if _is_tracker(child) and time.monotonic() < patience:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(_TICK_S)


def _direct_children() -> list[int]:
    me = os.getpid()
    processes = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                # "pid (command) state ppid …": the command may hold blanks and brackets, so split
                # behind the last bracket.
                if int(stat.read().rpartition(b")")[2].split()[1]) == me:
                    processes.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return processes


def _is_tracker(pid: int) -> bool:
    """True for Python's resource tracker, which removes the shared memory of processes that ended.
    A tracker ignores SIGTERM, so that it outlives them.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as command_line:
            return b"multiprocessing.resource_tracker" in command_line.read()
    except (FileNotFoundError, ProcessLookupError):
        return False  # ended meanwhile


def _signal_wakeup() -> int:
    """A file descriptor that becomes readable when a child ends or a signal asks the guard to stop."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    os.set_blocking(read_fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    return read_fd


def die_with(parent_pid: int):
    """The call that asks the kernel for SIGKILL at the parent's death; None where no kernel offers
    that.
    """
    if not LINUX:
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # died in between
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
