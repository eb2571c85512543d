"""Processes that stay up and answer one question after another: what hypothesis needs to draw problems for several ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from helpers import python_path
from lockstep.testing.programs import torchrun

ANSWER_S = 120
"""Seconds that an answer may take before the pool counts as lost."""


class Pool:
    """`program FOLDER SOCKET` in `processes` ranks under the trainer's launcher; each connects, then answers JSON lines."""

    def __init__(self, program: str, folder: Path, processes: int = 2) -> None:
        place, self.log = folder / "socket", folder / "pool.log"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(place))
        listener.listen(processes)
        listener.settimeout(ANSWER_S)
        command = torchrun(processes, program, str(folder), str(place))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.lines = [self._accept(listener) for _ in range(processes)]
        listener.close()

    def _accept(self, listener: socket.socket) -> Any:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise AssertionError(f"a rank did not start: {self.log.read_text()[-3000:]}") from None
        connection.settimeout(ANSWER_S)
        return connection.makefile("rw")

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's answer."""
        for lines in self.lines:
            lines.write(json.dumps(question) + "\n")
            lines.flush()
        answers = [lines.readline() for lines in self.lines]
        assert all(answers), f"a rank was lost: {self.log.read_text()[-3000:]}"
        return [json.loads(answer) for answer in answers]

    def close(self) -> None:
        for lines in self.lines:
            lines.close()
        assert self.process.wait(60) == 0, self.log.read_text()[-3000:]
