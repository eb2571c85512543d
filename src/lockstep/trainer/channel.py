"""JSON lines over a Unix socket between the parent and the trainer; `protocol.py` says what they
hold. Standard library only.

Request `{"id": 1, "verb": "train_step", "args": {...}, "secret": {...}}`; the secret stays in rank
0. Replies `{"id": 1, "event": {...}}` and, at the end of a verb, `{"id": 1, "result": {...}}` or
`{"id": 1, "error": {"type", "message", "traceback"}}`. The worker's first line is `{"token":
"..."}` and its second `{"id": 0, "result": {...}}` (ready) or `{"id": 0, "error": {...}}`.
"""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

TOKEN_VARIABLE = "LOCKSTEP_TRAINER_TOKEN"
"""Environment variable that carries the secret the worker identifies itself with."""

MAX_LINE = 64 * 1024 * 1024


class ChannelClosed(ConnectionError):
    """The other side is gone."""


class Channel:
    """One end of the connection. Sending is safe from several threads; receiving belongs to one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            self._connection.sendall(line)

    def receive(self) -> dict[str, Any]:
        """The next message. Raises ChannelClosed at end of file and ValueError on a line that is
        not a message.
        """
        line = self._reader.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise ChannelClosed("the other side closed the connection")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"expected a JSON object, got {type(message).__name__}")
        return message

    def close(self) -> None:
        self._reader.close()
        self._connection.close()


def connect(path: str) -> Channel:
    """Connect to the parent's Unix socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    return Channel(connection)


def result(request_id: int, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": request_id, "result": value}


def event(request_id: int, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": request_id, "event": value}


def error(request_id: int, kind: str, message: str, traceback: str = "") -> dict[str, Any]:
    return {"id": request_id, "error": {"type": kind, "message": message, "traceback": traceback}}
