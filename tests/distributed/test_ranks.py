"""The launcher of the trainer's ranks: who listens where, and that ranks end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frozen_processes import LOOPBACK
from helpers import python_path
from lockstep.process.child import child_env, spawn

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="sockets are read from /proc")

TALK = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from lockstep.engine.parallel.coordination import Agreement
from lockstep.engine.parallel.launch import group_settings
from frozen_processes import listening

dist.init_process_group("gloo", **group_settings())
value = torch.ones(1)
dist.all_reduce(value)
agreement = Agreement()
dist.barrier()
launcher = listening(os.getppid())
answer = {"sum": value.item(), "sockets": listening(os.getpid()), "launcher": launcher}
Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(answer))
agreement.store.add("done", 1)
dist.barrier()
dist.destroy_process_group()
"""
FAIL = """
import os, sys, time
from pathlib import Path
if os.environ["RANK"] == "1":
    while not Path(sys.argv[1], "0").exists():
        time.sleep(0.01)
    sys.exit(7)
Path(sys.argv[1], "written").write_text(str(os.getpid()))
Path(sys.argv[1], "written").rename(Path(sys.argv[1], "0"))
time.sleep(600)
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "rank.py"
    path.write_text(script)
    command = [sys.executable, "-m", "lockstep.engine.parallel.launch", "2", str(path), str(folder)]
    helpers = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=helpers)


@linux_only
def test_ranks_meet_and_every_socket_is_on_loopback(tmp_path):
    done = run(TALK, tmp_path)
    assert done.returncode == 0, done.stderr
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [answer["sum"] for answer in answers] == [2.0, 2.0]
    sockets = answers[0]["sockets"] + answers[1]["sockets"]
    assert sockets  # gloo's
    assert answers[0]["launcher"] == []
    assert set(sockets) <= LOOPBACK, sockets


MEET = """
import json, os, stat, sys
from pathlib import Path
import torch.distributed as dist
from lockstep.engine.parallel.coordination import Agreement
from lockstep.engine.parallel.launch import FOLDER_VARIABLE, group_settings

dist.init_process_group("gloo", **group_settings())
agreement = Agreement()
if agreement.rank == 0:
    agreement.publish(1, {"id": 1, "verb": "memory"})
request = agreement.await_request(1)
folder = Path(os.environ[FOLDER_VARIABLE])
owned = [stat.S_IMODE(folder.stat().st_mode), folder.stat().st_uid == os.getuid()]
child = os.fork()
if child == 0:
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        next(folder.iterdir()).write_text("shutdown")
        os._exit(1)
    except PermissionError:
        os._exit(0)
    os._exit(2)
refused = os.waitpid(child, 0)[1] == 0
tcp = [type(store).__name__ for store in (agreement.store, dist.distributed_c10d._get_default_store())]
dist.barrier()
answer = {"request": request, "owned": owned, "refused": refused or os.getuid() != 0, "stores": tcp}
Path(sys.argv[1], f"{agreement.rank}.json").write_text(json.dumps(answer))
dist.destroy_process_group()
"""


@linux_only
def test_c1_no_other_user_reaches_the_ranks_stores(tmp_path):
    """The audit's attack read requests from a TCPStore and wrote `shutdown` into it. Ranks meet in a private folder now."""
    done = run(MEET, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        answer = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answer["request"] == {"id": 1, "verb": "memory"}
        assert answer["owned"] == [0o700, True]
        assert answer["refused"]
        assert not any("TCP" in name for name in answer["stores"]), answer["stores"]


def test_a_rank_that_fails_ends_the_others_and_gives_its_status(tmp_path):
    done = run(FAIL, tmp_path)
    assert done.returncode == 1, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text()), 0)
    assert "exitcode  : 7" in done.stderr


STAY = """
import os, sys, time
from pathlib import Path
from lockstep.engine.parallel.launch import die_with_launcher

die_with_launcher()
Path(sys.argv[1], f"{os.environ['RANK']}.part").write_text(str(os.getpid()))
Path(sys.argv[1], f"{os.environ['RANK']}.part").rename(Path(sys.argv[1], os.environ["RANK"]))
while True:
    time.sleep(1)
"""


@linux_only
def test_m6_ranks_end_when_their_guard_is_killed(tmp_path):
    """Once the launcher alone ended, and an orphan trained on in silence."""
    (tmp_path / "rank.py").write_text(STAY)
    command = [sys.executable, "-m", "lockstep.engine.parallel.launch", "2", str(tmp_path / "rank.py"), str(tmp_path)]
    child = spawn(command, child_env(), tmp_path / "log", "ranks")
    places = [tmp_path / str(rank) for rank in range(2)]
    try:
        assert until(lambda: all(place.exists() for place in places), 60.0), child.log_tail()
        ranks = [int(place.read_text()) for place in places]
        os.kill(child.pid, signal.SIGKILL)
        assert until(lambda: not any(Path(f"/proc/{rank}/cmdline").exists() for rank in ranks), 20.0)
    finally:
        child.kill()


def until(holds, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(holds())
