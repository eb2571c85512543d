"""A process that runs an environment's rollouts: JSON lines in, JSON lines out. It ends with this one."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST_LINE = 1 << 24
"""Bytes of an answer."""


class EnvironmentFailedError(Exception):
    """A rollout's environment raised an error, or its process ended. The notes have the traceback."""


class Worker:
    """Starts with the first rollout, and again with the next one after its end.

    begin: the first line that the process reads; its first answer is passed over.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], begin: Mapping[str, Any]):
        self._name, self._command, self._environment, self._begin = name, list(command), dict(environment), begin
        self._numbers = itertools.count()
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last: deque[str] = deque(maxlen=40)
        self._readers: set[asyncio.Task[None]] = set()

    async def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one rollout. Raises EnvironmentFailedError with the traceback of the process."""
        process = await self._running()
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"rollout": number, **question}).encode() + b"\n")
        try:
            said = await answer
        finally:
            self._waiting.pop(number, None)
        if "error" in said:
            failed = EnvironmentFailedError(f"{self._name}: {said['error']}")
            failed.add_note(f"In the environment's process:\n{said['traceback']}")
            raise failed
        return said

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                # It ends when its standard input does, which is ours to hold.
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    env=self._environment,
                    limit=_LONGEST_LINE,
                )
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(self._begin).encode() + b"\n")
                for reading in (self._answers(self._process), self._errors(self._process)):
                    reader = asyncio.ensure_future(reading)
                    self._readers.add(reader)  # a task that nobody holds may vanish
                    reader.add_done_callback(self._readers.discard)
            return self._process

    async def _answers(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            said = json.loads(line)
            waiting = self._waiting.get(said.get("rollout", -1))
            if waiting is not None and not waiting.done():
                waiting.set_result(said)
        code = await process.wait()
        text = "\n".join(self._last)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result({"error": f"its process ended with exit code {code}", "traceback": text})

    async def _errors(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self._last.append(line.decode(errors="replace").rstrip())
