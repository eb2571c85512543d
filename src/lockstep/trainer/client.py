"""The trainer processes seen from the parent: start them, ask them for things, notice when they
die.

The parent listens on a Unix socket in a private folder. Rank 0 connects, shows with a token that
the parent started it, and answers JSON lines. Every request has a deadline. Tensors travel as
safetensors files, never over the socket.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from lockstep.config import deadlines
from lockstep.errors import TrainerError, TrainerLostError, error_of
from lockstep.process.child import LONGEST_SOCKET, Child, child_env, spawn, visible_gpus
from lockstep.process.guard import locked_folder
from lockstep.process.patience import Patience
from lockstep.process.stopped import stopped_below
from lockstep.trainer.channel import TOKEN_VARIABLE
from lockstep.trainer.life import Signs
from lockstep.trainer.protocol import Answer, EngineConfig, Ready, Request, from_json, split_secrets, to_json

_LINE_LIMIT = 64 * 2**20


class Trainer:
    """Resident trainer processes, one request at a time."""

    def __init__(self, folder: Path, lock: int, child: Child, server: asyncio.Server, connection: asyncio.Future):
        self._folder = folder
        self._lock_of_folder: int | None = lock
        self._child = child
        self._server = server
        self._connection = connection
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._requests = 0
        self._lock = asyncio.Lock()
        self._patience = Patience(deadlines.SILENT_S)
        self.ready: Ready | None = None
        self.on_beat: Callable[[str, str], Awaitable[None]] | None = None
        """Called at each sign of life with the phase that the trainer is in, and what the phase
        waits for.
        """

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        processes: int,
        log_path: Path,
        deadline_s: float = deadlines.TRAINER_START_S,
        gpus: tuple[int, ...] | None = None,
    ) -> Trainer:
        """Start `processes` ranks with `config` (engine.json) and wait until the model is loaded.

        gpus: what they may use; none of them is the CPU, None all that this process may.

        Raises TrainerError with the log's last lines if a process dies or `deadline_s` passes.
        """
        scratch, lock = locked_folder()  # 0700: only this user reaches the socket
        folder = Path(scratch)
        socket, config_path = folder / "trainer.sock", folder / "engine.json"
        if len(os.fsencode(socket)) > LONGEST_SOCKET:
            _removed(folder, lock)
            raise TrainerError(
                f"{folder.parent} is too long for the path of a Unix socket: set TMPDIR to a shorter folder"
            )
        config_path.write_text(json.dumps(to_json(config)))
        token = secrets.token_urlsafe(32)
        connection: asyncio.Future = asyncio.get_running_loop().create_future()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hello = json.loads(await reader.readline() or b"{}")
            if connection.done() or not hmac.compare_digest(str(hello.get("token")), token):
                writer.close()
                return
            connection.set_result((reader, writer))

        server = await asyncio.start_unix_server(accept, path=str(socket), limit=_LINE_LIMIT)
        command = [
            *(sys.executable, "-m", "lockstep.engine.parallel.launch", str(processes)),
            *("-m", "lockstep.engine.worker", "--config", str(config_path), "--socket", str(socket)),
        ]
        threads = max(1, (os.cpu_count() or 1) // processes)
        extra = {TOKEN_VARIABLE: token, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        if gpus is not None:
            extra["CUDA_VISIBLE_DEVICES"] = visible_gpus(gpus)
        if "PYTHONPATH" in os.environ:  # the trainer runs in this very environment, unlike the server
            extra["PYTHONPATH"] = os.environ["PYTHONPATH"]
        child = spawn(command, child_env(extra), log_path, "trainer", removes=(folder,))
        trainer = cls(folder, lock, child, server, connection)
        try:
            await trainer._connect(deadline_s)
            trainer.ready = from_json(Ready, await trainer._answer(0, "start", deadline_s), "the trainer's start")
            if trainer.ready.device == "cpu":
                trainer._patience = Patience(deadlines.HUNG_S)
        except BaseException:
            await trainer.close()
            raise
        return trainer

    async def _connect(self, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while not self._connection.done():
            self._check_alive("start")
            if time.monotonic() > end:
                raise TrainerError(f"trainer did not connect within {deadline_s:.0f} s; {self._last_lines()}")
            await asyncio.wait([self._connection], timeout=0.1)
        self._reader, self._writer = self._connection.result()

    def _check_alive(self, doing: str) -> None:
        code = self._child.poll()
        if code is not None:
            raise TrainerLostError(f"trainer died (exit code {code}) during {doing}; {self._last_lines()}")

    def _last_lines(self) -> str:
        return f"last lines of {self._child.log_path}:\n{self._child.log_tail(12)}"

    async def call(self, request: Request[Answer], *, deadline_s: float, job: str | None = None) -> Answer:
        """Ask, and wait for the answer. `deadline_s` bounds the time without progress: heartbeats
        alone are none. Where the trainer's speed is known, ten times its longest standstill does.

        job: an id. A request that was answered well under that id is not run again: its answer is
            sent again.

        Raises the trainer's own error if it is the user's to fix, else TrainerError;
        TrainerLostError where its processes ended, were stopped, or showed no progress.
        """
        async with self._lock:
            if self._writer is None:
                raise TrainerError(f"trainer is closed, it can't {request.verb}")
            self._requests += 1
            fields, secret = split_secrets(request)
            message = {"id": self._requests, "verb": request.verb, "args": fields, "secret": secret, "job": job}
            self._writer.write(json.dumps(message).encode() + b"\n")
            raw = await self._answer(self._requests, request.verb, deadline_s)
            return from_json(request.answer, raw, f"the trainer's answer to {request.verb}")

    async def _answer(self, number: int, verb: str, deadline_s: float) -> dict[str, Any]:
        """The result of request `number`."""
        life = Signs(verb, deadline_s, self._patience)
        while True:
            reply = json.loads(await self._line(life, None if number else deadline_s))
            if reply["id"] != number:
                continue  # a late message of a request that was given up
            if (event := reply.get("event")) is not None:
                if life.heard(event):
                    raise self._lost("stands still", life)
                if self.on_beat is not None:
                    await self.on_beat(life.phase, life.waits_for)
                continue
            if "error" not in reply:
                life.answered()
                return reply["result"]
            error = reply["error"]
            # An error that is the user's to fix keeps its type.
            unknown = f"{verb} failed: {error['type']}: {error['message']} (log: {self._child.log_path})"
            raise error_of(error["type"], error["message"], TrainerError(unknown))

    async def _line(self, life: Signs, silence_s: float | None) -> bytes:
        """The next message. Raises TrainerLostError after a silence, and for a process that is
        stopped.

        silence_s: None for what the trainer's earlier silences allow.
        """
        assert self._reader is not None
        silent_s, stopped = 0.0, set()
        limit_s = self._patience.limit_s("silence", deadlines.SILENT_S) if silence_s is None else silence_s
        reading = asyncio.ensure_future(self._reader.readline())
        try:
            while not (await asyncio.wait({reading}, timeout=deadlines.LOOK_S))[0]:
                silent_s += deadlines.LOOK_S  # looks are counted: this process may have been stopped itself
                if silent_s > limit_s:
                    raise self._lost("is silent", life, silent_s)
                looked = set(await asyncio.to_thread(stopped_below, self._child.pid))
                if both := looked & stopped:
                    raise self._lost(f"is stopped (SIGSTOP, process {min(both)})", life, silent_s)
                stopped = looked
            line = reading.result() if not isinstance(reading.exception(), ConnectionError) else b""
        finally:
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})  # the next line may be asked for at once
        if not line:
            try:
                code = await asyncio.to_thread(self._child.wait, deadlines.ENDED_S)
            except TimeoutError:
                raise self._lost("closed its connection", life) from None
            raise TrainerLostError(f"trainer died (exit code {code}) during {life.verb}; {self._last_lines()}")
        if silence_s is None:
            self._patience.took("silence", silent_s)
        return line

    def _lost(self, why: str, life: Signs, silent_s: float = 0.0) -> TrainerLostError:
        return TrainerLostError(f"trainer {why} during {life.verb}{life.described(silent_s)}; {self._last_lines()}")

    async def close(self) -> None:
        """End the processes; returns when none is left."""
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None
        self._server.close()
        await asyncio.to_thread(self._child.terminate, 5.0)
        lock, self._lock_of_folder = self._lock_of_folder, None
        if lock is not None:
            _removed(self._folder, lock)


def _removed(folder: Path, lock: int) -> None:
    """The trainer's guard removes the folder too, where this process was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
