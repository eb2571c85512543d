"""Signs of life of all ranks while a verb runs: the phase, how far each rank has come, and where
its Python stands.

Rank 0 sends them to the parent. The other ranks leave theirs in the ranks' private folder.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lockstep.config import deadlines
from lockstep.engine.parallel.launch import FOLDER_VARIABLE
from lockstep.engine.parallel.progress import progress
from lockstep.trainer import channel as channels

Json = dict[str, Any]
_OURS = f"{os.sep}lockstep{os.sep}"


class Sending(Protocol):
    """What takes the messages for the parent."""

    def send(self, message: Json) -> None: ...


class heartbeat:
    """Sends an event every second while a verb runs, and one at each `report` of a new phase."""

    def __init__(self, channel: Sending, identity: int, rank: int, world: int) -> None:
        self.channel, self.identity, self.rank, self.world = channel, identity, rank, world
        self.done = threading.Event()
        self.state: Json = {"phase": "start"}

    def report(self, value: Json) -> None:
        self.state = {name: value[name] for name in ("phase", "waits_for") if name in value}
        self._send(value)

    def __enter__(self) -> Callable[[Json], None]:
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()
        return self.report

    def _beat(self) -> None:
        while not self.done.wait(deadlines.HEARTBEAT_S):
            self._send({"kind": "heartbeat", **self.state})

    def _send(self, value: Json) -> None:
        here = {"progress": progress.count, "where": where(), "phase": self.state["phase"]}
        if self.rank:
            _leave(self.rank, here)
        else:
            ranks = [here, *(_left(rank) for rank in range(1, self.world))]
            self.channel.send(channels.event(self.identity, value | {"ranks": ranks}))

    def __exit__(self, *_exception: object) -> None:
        self.done.set()
        self.thread.join()


def where() -> str:
    """The innermost place in Lockstep's own code at which the main thread is now."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None and _OURS not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None or innermost is None:
        return "?"
    place = f"{frame.f_code.co_filename.rpartition(_OURS)[2]}:{frame.f_lineno}"
    return place if frame is innermost else f"{place}, in {innermost.f_code.co_name}"


def _leave(rank: int, here: Json) -> None:
    path = _file(rank)
    writing = path.with_suffix(f".{threading.get_ident()}")
    try:
        writing.write_text(json.dumps(here))
        writing.replace(path)
    except FileNotFoundError:  # the launcher has ended, and its folder with it
        return


def _left(rank: int) -> Json:
    """What a rank has left; its first sign may be still to come."""
    try:
        return json.loads(_file(rank).read_text())
    except FileNotFoundError:
        return {}


def _file(rank: int) -> Path:
    return Path(os.environ[FOLDER_VARIABLE]) / f"beat-{rank}"
