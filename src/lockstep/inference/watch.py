"""Watches over a server. One that hangs is ended, so that everybody who waits for it hears at once,
and recovers as from any other end of a server.

A thread of its own: a user's event loop may stand still for longer than the server does.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from typing import Any

from lockstep.config import deadlines
from lockstep.inference.client import Server
from lockstep.process.patience import Patience
from lockstep_wire import http_paths

_API = "the HTTP server"


def watch(server: Server, patience: Patience) -> None:
    """Look at `server` every second, from now until it is closed or has ended.

    Its engine hangs when it is silent for longer than `patience` allows for what it is busy with.
    Silence is counted in looks and not by the clock: this process may have been stopped itself.
    """
    threading.Thread(target=_Watch(server, patience).run, daemon=True, name="watch").start()


class _Watch:
    def __init__(self, server: Server, patience: Patience) -> None:
        self._server, self._patience = server, patience
        self._silent_s, self._busy_with = 0.0, ""

    def run(self) -> None:
        server = self._server
        while not server.closing.wait(deadlines.HEARTBEAT_S) and server.child.poll() is None:
            started = time.monotonic()
            try:
                seen = _look(server)
            except TimeoutError:
                seen = {"answered": False, "work": _API}
            except (OSError, http.client.HTTPException, ValueError):  # it is ending, or was never ours
                continue
            self._note(seen, min(time.monotonic() - started, 2 * deadlines.HEARTBEAT_S))

    def _note(self, seen: dict[str, Any], took_s: float) -> None:
        """took_s: of the look; a longer one says more about this process than about the server."""
        work = str(seen["work"])
        for kind, seconds in seen.get("longest_s", {}).items():
            self._patience.took(kind, seconds)
        self._silent_s += took_s
        if seen["answered"]:
            if self._busy_with or work:  # the speed of idle workers says nothing
                self._patience.took(self._busy_with or work, self._silent_s)
            self._patience.took(_API, took_s)
            self._silent_s, self._busy_with = 0.0, ""
            return
        self._busy_with = work
        unknown_s = deadlines.SYNC_S if work not in ("", "requests", _API) else deadlines.SILENT_S
        unknown_s = max(unknown_s, self._patience.floor_s)
        if self._silent_s > self._patience.limit_s(work or "requests", unknown_s):
            self._end()

    def _end(self) -> None:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - self._silent_s))
        who = _API if self._busy_with == _API else "vLLM's engine"
        busy = f", busy with {self._busy_with}," if self._busy_with not in ("", _API) else ""
        self._server.hung = (
            f"hangs: {who}{busy} has not answered the backend since {since} ({self._silent_s:.0f} s), and was ended"
        )
        self._server.child.kill()


def _look(server: Server) -> dict[str, Any]:
    """The server's own look at its engine. Raises TimeoutError for an HTTP server that hangs."""
    host, _, port = server.root_url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=2 * deadlines.HEARTBEAT_S)
    try:
        connection.request("GET", http_paths.ALIVE, headers={"Authorization": f"Bearer {server.api_key}"})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()
