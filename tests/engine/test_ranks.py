"""The launcher of the trainer's ranks: who listens where, and that ranks end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="sockets are read from /proc")

TALK = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from lockstep.engine.agreement import Agreement

def listening(pid):
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(file))
        except FileNotFoundError:  # the descriptor that lists the others
            pass
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1].split(":")[0])
    return found

dist.init_process_group("gloo")
value = torch.ones(1)
dist.all_reduce(value)
agreement = Agreement()
dist.barrier()
sockets = listening(os.getpid()) + (listening(os.getppid()) if dist.get_rank() == 0 else [])
Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps({"sum": value.item(), "sockets": sockets}))
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
    command = [sys.executable, "-m", "lockstep.engine.ranks", "2", str(path), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@linux_only
def test_ranks_meet_and_every_socket_is_on_loopback(tmp_path):
    done = run(TALK, tmp_path)
    assert done.returncode == 0, done.stderr
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [answer["sum"] for answer in answers] == [2.0, 2.0]
    sockets = answers[0]["sockets"] + answers[1]["sockets"]
    assert len(sockets) >= 3  # the launcher's store, the agreement's, and gloo's
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(sockets) <= loopback, sockets


def test_a_rank_that_fails_ends_the_others_and_gives_its_status(tmp_path):
    done = run(FAIL, tmp_path)
    assert done.returncode == 1, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text()), 0)
    assert "exitcode  : 7" in done.stderr
