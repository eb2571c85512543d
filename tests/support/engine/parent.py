"""The parent's side of the trainer protocol, for tests: start a worker, send verbs, read replies."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
from pathlib import Path
from typing import Any

from lockstep.testing.programs import torchrun
from lockstep.trainer import channel as protocol


class Parent:
    def __init__(self, folder: Path, settings: dict[str, Any], processes: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.events: list[dict[str, Any]] = []
        self.number = 0
        config, path = folder / "engine.json", str(folder / "socket")
        config.write_text(json.dumps(settings))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(120)
        secret = secrets.token_hex(16)
        environment = os.environ | {protocol.TOKEN_VARIABLE: secret, "OMP_NUM_THREADS": "1"}
        command = torchrun(processes, "-m", "lockstep.engine.worker", "--config", str(config), "--socket", path)
        self.log = folder / "worker.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        connection, _ = listener.accept()
        connection.settimeout(120)
        listener.close()
        self.channel = protocol.Channel(connection)
        assert self.channel.receive() == {"token": secret}
        self.ready = self.reply(0)

    def reply(self, number: int) -> dict[str, Any]:
        while True:
            message = self.channel.receive()
            assert message["id"] == number
            if "event" not in message:
                return message
            self.events.append(message["event"])

    def ask(self, verb: str, job: str | None = None, **args: Any) -> dict[str, Any]:
        """The whole reply."""
        self.number += 1
        self.channel.send({"id": self.number, "verb": verb, "args": args, "timeout_s": 120, "job": job})
        return self.reply(self.number)

    def call(self, verb: str, **args: Any) -> dict[str, Any]:
        """The result; a failure is an AssertionError."""
        reply = self.ask(verb, **args)
        assert "result" in reply, reply.get("error", {}).get("traceback") or reply
        return reply["result"]

    def close(self) -> int:
        self.call("shutdown")
        self.channel.close()
        return self.process.wait(60)
