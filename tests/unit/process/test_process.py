"""Children die with their parent, whatever happens to either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from lockstep.process.child import child_env, spawn

# A command with a child that left its session, whose own child left it again; all write their ids to a file.
TREE = """
import os, sys, time
def note():
    with open(sys.argv[1], "a") as ids:
        ids.write(f"{os.getpid()}\\n")
note()
if os.fork() == 0:
    os.setsid(); note()
    if os.fork() == 0:
        os.setsid(); note()
time.sleep(600)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)
# A command whose child makes shared memory and a temporary folder with something in it, and says their names.
MAKER = """
import os, tempfile, time
from multiprocessing.shared_memory import SharedMemory
if os.fork() == 0:
    memory = SharedMemory(create=True, size=4096)
    folder = tempfile.mkdtemp()
    open(os.path.join(folder, "some"), "w").close()
    print(f"/dev/shm/{memory.name} {folder} ready", flush=True)
time.sleep(600)
"""
# A parent that starts the tree under a guard, and forks a child of its own, which keeps every descriptor open.
PARENT = """
import os, sys, time
from pathlib import Path
from lockstep.process.child import child_env, spawn
child = spawn([sys.executable, "-c", sys.argv[1], sys.argv[2]], child_env(), Path(sys.argv[3]), "tree")
sibling = os.fork()
if sibling:
    print(child.pid, sibling, flush=True)
time.sleep(600)
"""

LONG = 60.0
"""Seconds that no machine needs, however loaded: what is tested is that it happens at all."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group is killed")


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(condition, seconds: float = LONG) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def ids_in(path: Path, count: int) -> list[int]:
    assert until(lambda: path.exists() and len(path.read_text().split()) == count)
    return [int(word) for word in path.read_text().split()]


def start_tree(tmp_path: Path):
    child = spawn([sys.executable, "-c", TREE, str(tmp_path / "ids")], child_env(), tmp_path / "logs" / "log", "tree")
    return child, ids_in(tmp_path / "ids", 3)


@linux_only
def test_the_tree_dies_with_its_parent_on_sigkill(tmp_path):
    arguments = [sys.executable, "-c", PARENT, TREE, str(tmp_path / "ids"), str(tmp_path / "logs" / "log")]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    guard, sibling = map(int, parent.stdout.readline().split())
    members = [guard, *ids_in(tmp_path / "ids", 3)]
    assert all(map(alive, members))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    try:
        assert until(lambda: not any(map(alive, members))), [pid for pid in members if alive(pid)]
        assert alive(sibling)  # it held the pipe all the time
    finally:
        os.kill(sibling, signal.SIGKILL)


@linux_only
def test_terminate_and_the_commands_own_end_leave_nothing(tmp_path):
    child, members = start_tree(tmp_path)
    assert child.poll() is None
    with pytest.raises(TimeoutError, match="tree"):
        child.wait(0.05)
    assert child.terminate(LONG) == 128 + signal.SIGTERM
    assert not any(map(alive, members))
    assert child.terminate(LONG) == 128 + signal.SIGTERM  # harmless when it has ended

    (tmp_path / "ids").unlink()
    child, members = start_tree(tmp_path)
    os.kill(members[0], signal.SIGKILL)  # the command itself, as when vLLM's API process is killed
    assert child.wait(LONG) == 128 + signal.SIGKILL
    assert not any(map(alive, members))


@linux_only
@pytest.mark.parametrize("ended", ["killed", "terminated", "by itself"])
def test_nothing_is_left_on_disk_or_in_memory(tmp_path, ended):
    """Each of vLLM's servers makes 400 MB of shared memory, and sockets."""
    child = spawn([sys.executable, "-c", MAKER], child_env(), tmp_path / "log", "maker")
    assert until(lambda: child.log_tail().endswith("ready"))
    left = [Path(word) for word in child.log_tail().split()[:2]]
    left.append(left[1].parent)
    assert all(path.exists() for path in left)
    assert left[2] != Path(tempfile.gettempdir())
    if ended == "by itself":
        os.kill(int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text()), signal.SIGKILL)
        child.wait(LONG)
    else:
        child.terminate(LONG if ended == "terminated" else 0.0)
    assert not any(path.exists() for path in left)


def test_a_child_has_a_group_of_its_own_in_our_session(tmp_path):
    """A group, so that Ctrl-C is for us alone; our session, since Linux shares its processors out by session: a server that spins in
    another one kept its client from running for a second at a time.
    """
    child = spawn([sys.executable, "-c", "import time; time.sleep(600)"], child_env(), tmp_path / "log", "sleeper")
    assert os.getpgid(child.pid) == child.pid != os.getpgrp()
    assert os.getsid(child.pid) == os.getsid(0)
    child.kill()


@linux_only
def test_the_command_dies_with_its_guard(tmp_path):
    child = spawn([sys.executable, "-c", STUBBORN], child_env(), tmp_path / "log", "stubborn")
    assert until(lambda: child.log_tail() == "ready")
    command = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())
    os.kill(child.pid, signal.SIGKILL)
    assert until(lambda: not alive(command))
    assert child.wait(LONG) == -signal.SIGKILL


def test_a_command_that_ignores_sigterm_is_killed_after_its_grace(tmp_path):
    child = spawn([sys.executable, "-c", STUBBORN], child_env(), tmp_path / "log", "stubborn")
    assert until(lambda: child.log_tail() == "ready")
    assert child.terminate(0.3) == 128 + signal.SIGKILL


def test_a_child_outlives_the_thread_that_started_it(tmp_path):
    started = []
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    thread = threading.Thread(target=lambda: started.append(spawn(command, child_env(), tmp_path / "log", "sleeper")))
    thread.start()
    thread.join()
    with pytest.raises(TimeoutError):
        started[0].wait(1.0)
    assert started[0].kill() == 128 + signal.SIGKILL


def test_exit_status_log_and_environment(tmp_path, monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SECRET_TOKEN", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, "/leaks")
    monkeypatch.setenv("HF_HOME", "/kept")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert child_env(installer=True)["PIP_INDEX_URL"] == "/leaks"
    code = "import os; print(*sorted(f'{n}={v}' for n, v in os.environ.items()), sep='\\n'); raise SystemExit(7)"
    log = tmp_path / "logs" / "log"
    child = spawn([sys.executable, "-I", "-c", code], child_env({"GIVEN": "yes"}), log, "environment")
    assert child.wait(LONG) == 7
    seen = dict(line.split("=", 1) for line in log.read_text().splitlines())
    assert "/leaks" not in seen.values()
    assert (seen["GIVEN"], seen["HF_HOME"], seen["CUDA_VISIBLE_DEVICES"]) == ("yes", "/kept", "3")
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700
    assert child.log_tail(1) == log.read_text().splitlines()[-1]


def test_a_command_that_does_not_exist_is_named_in_the_log(tmp_path):
    child = spawn(["/no/such/program"], child_env(), tmp_path / "log", "missing")
    assert child.wait(LONG) == 127
    assert "/no/such/program" in child.log_tail()


def test_m9_the_tail_of_a_log_is_of_this_life_only(tmp_path):
    log = tmp_path / "log"
    for word in ("first", "second"):
        child = spawn([sys.executable, "-I", "-c", f"print('{word} life')"], child_env(), log, word)
        assert child.wait(LONG) == 0
    assert child.log_tail() == "second life"
    assert "first life" in log.read_text()
    log.write_text("emptied")
    assert child.log_tail() == "emptied"


def test_m13_no_child_gets_a_token_and_only_the_installer_gets_the_indexs_password(monkeypatch):
    for name in ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "UV_INDEX_X_PASSWORD"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    assert "s3cret" not in child_env().values()
    assert child_env()["HF_ENDPOINT"] == "https://mirror"
    assert [name for name, value in child_env(installer=True).items() if value == "s3cret"] == ["UV_INDEX_X_PASSWORD"]


HOLDER = """
import sys
from pathlib import Path
from lockstep.process.child import child_env, spawn
child = spawn([sys.executable, "-c", "import time; time.sleep(60)"], child_env(), Path(sys.argv[1]), "held", removes=[Path(sys.argv[2])])
print(child.pid, flush=True)
child.wait(60)
"""


def test_m1_a_folder_goes_with_the_tree_when_the_parent_is_killed(tmp_path):
    folder = tmp_path / "with the tree"
    folder.mkdir()
    (folder / "trainer.sock").touch()
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "log"), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert until(lambda: not folder.exists())


@linux_only
def test_m1_what_a_killed_guard_left_goes_at_the_next_start(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "lockstep-not-ours").mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]

    def folders():
        return {folder for folder in scratch.iterdir() if folder.name != "lockstep-not-ours"}

    killed, living = (spawn(sleep, child_env(), tmp_path / "log", name) for name in ("killed", "living"))
    assert until(lambda: len(folders()) == 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(LONG)
    left = folders()
    assert len(left) == 2
    third = spawn(sleep, child_env(), tmp_path / "log", "third")
    assert len(left & folders()) == 1
    living.kill()
    third.kill()
    assert not folders()
    assert (scratch / "lockstep-not-ours").is_dir()
