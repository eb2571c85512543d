"""The trainer process: `python -m lockstep.engine.parallel.launch N -m lockstep.engine.worker
--config engine.json --socket PATH`.

Rank 0 speaks to the parent (`trainer/protocol.py`), every rank runs every verb (`verbs.py`). A verb
that fails leaves the worker usable; when weights were already changed it refuses to go on until
`load`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.config import deadlines

# Import order matters: `device` prepares torch for Megatron before anything else loads it.
from lockstep.engine.parallel import device  # isort: skip
from lockstep.engine.parallel.coordination import LOST, Agreement
from lockstep.engine.parallel.heartbeat import heartbeat
from lockstep.engine.parallel.launch import die_with_launcher
from lockstep.engine.state import open_trainer
from lockstep.engine.verbs import Verbs
from lockstep.errors import ConfigError, LockstepError, TrainerError
from lockstep.trainer import channel as channels
from lockstep.trainer.channel import Channel, ChannelClosed
from lockstep.trainer.protocol import REQUESTS, EngineConfig, Load, Ready, from_json, to_json

Json = dict[str, Any]


class Silent:
    """The channel of ranks other than 0: none."""

    def send(self, message: Json) -> None:
        """Nothing: the parent listens to rank 0 only."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class Worker:
    """One rank between start and shutdown.

    `stale`: weights differ from the last step the parent knows of.
    """

    verbs: Verbs
    channel: Channel | Silent
    agreement: Agreement
    stale: bool = False
    answered: dict[str, Json] = field(default_factory=dict)
    """Results of jobs since the last `load`, by verb and job: a job that is asked for again is not
    done again.
    """

    def serve(self, receive: Callable[[int], Json]) -> None:
        """Answer requests until shutdown. `receive(n)` gives the n-th request."""
        number = 1
        while True:
            request = receive(number)
            if request.get("verb") == "shutdown":
                self.agreement.settle(number, None, deadlines.SHUTDOWN_S)  # rank 0 holds the store: it leaves last
                if request["id"] >= 0:  # below: the parent has gone, and nobody listens
                    self.channel.send(channels.result(request["id"], {}))
                return
            self.answer(number, request)
            if self.agreement.rank == 0 and number > 2:
                self.agreement.forget(number - 2)
            number += 1

    def answer(self, number: int, request: Json) -> None:
        """Run one verb on this rank, agree on its outcome with the others, and reply."""
        identity, timeout_s = int(request["id"]), float(request.get("timeout_s") or deadlines.RANKS_S)
        key = f"{request.get('verb')} {request['job']}" if request.get("job") else None
        if key in self.answered:
            self.channel.send(channels.result(identity, self.answered[key]))
            return
        before, result, error = self.verbs.trainer.optimizer.count, None, None

        def give_up(why: str) -> None:
            self.channel.send(
                channels.error(identity, "TrainerLostError", f"rank {self.agreement.rank} was lost: {why}")
            )

        beats = heartbeat(self.channel, identity, self.agreement.rank, self.agreement.world)
        with self.agreement.watched(number, timeout_s, give_up), beats as report:
            try:
                result = self.run(request, report)
            except Exception as caught:  # noqa: BLE001 (the boundary: every failure becomes a reply)
                error = describe(caught, self.agreement.rank)
        error = self.agreement.settle(number, error, timeout_s)
        if error is None:
            if key is not None:
                self.answered[key] = result or {}
            self.channel.send(channels.result(identity, result or {}))
            return
        self.stale = self.stale or self.verbs.trainer.optimizer.count != before
        self.channel.send(channels.error(identity, error["type"], error["message"], error["traceback"]))
        if error.get("fatal"):
            os._exit(LOST)

    def run(self, raw: Json, report: Callable[[Json], None]) -> Json:
        verb = raw.get("verb")
        if verb not in self.verbs.handlers:
            raise ConfigError(f"unknown verb {verb!r}; known: {', '.join(REQUESTS)}")
        if self.stale and verb != Load.verb:
            raise TrainerError(
                "an earlier step failed after it had changed the weights; load the last published step first"
            )
        request = from_json(REQUESTS[verb], (raw.get("args") or {}) | (raw.get("secret") or {}), f"request {verb}")
        answer = self.verbs.run(request, report)
        if verb == Load.verb:
            self.stale = False
            self.answered.clear()
        return to_json(answer)


def share(number: int, request: Json, agreement: Agreement) -> None:
    """Publish a request to the other ranks, without the secret that rank 0 alone may know."""
    agreement.publish(number, {name: value for name, value in request.items() if name != "secret"})


def describe(caught: Exception, rank: int) -> dict[str, str]:
    """An exception as a message; a LockstepError is for the user and speaks for itself."""
    known = isinstance(caught, LockstepError)
    text = str(caught) if known else f"rank {rank}: {type(caught).__name__}: {caught}"
    return {"type": type(caught).__name__, "message": text, "traceback": traceback.format_exc()}


def start(config: Path, channel: Channel | Silent) -> Worker:
    """Process groups, model, optimizer. Raises LockstepError on every rank if it fails on one."""
    settings = from_json(EngineConfig, json.loads(config.read_text()), "engine.json")
    device.start(settings.parallel, settings.seed, settings.timeout_s)
    agreement = Agreement()
    trainer, error = None, None
    with agreement.watched(
        0, settings.timeout_s, lambda why: channel.send(channels.error(0, "TrainerError", f"start-up failed: {why}"))
    ):
        try:
            trainer = open_trainer(settings)
        except Exception as caught:  # noqa: BLE001 (the boundary: every failure becomes a reply)
            error = describe(caught, agreement.rank)
    error = agreement.settle(0, error, settings.timeout_s)
    if error is not None or trainer is None:
        channel.send(channels.error(0, error["type"], error["message"], error["traceback"]) if error else {})
        sys.exit(1)
    return Worker(Verbs(trainer, agreement), channel, agreement)


def ready(worker: Worker) -> Ready:
    return Ready(
        world=worker.agreement.world,
        trained_parameters_rank0=sum(trainable.parameter.numel() for trainable in worker.verbs.trainer.trainables),
        device=str(device.device()),
        peak_memory_bytes=device.peak_memory(),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    die_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us through the guard
    leader = os.environ.get("RANK", "0") == "0"
    channel: Channel | Silent = channels.connect(arguments.socket) if leader else Silent()
    channel.send({"token": os.environ.pop(channels.TOKEN_VARIABLE, "")})
    try:
        worker = start(arguments.config, channel)
    except LockstepError as error:
        channel.send(channels.error(0, type(error).__name__, str(error), traceback.format_exc()))
        sys.exit(error.exit_code)
    channel.send(channels.result(0, to_json(ready(worker))))

    def receive(number: int) -> Json:
        if not isinstance(worker.channel, Channel):
            return worker.agreement.await_request(number)
        try:
            request = worker.channel.receive()
        except ChannelClosed:
            request = {"id": -1, "verb": "shutdown"}
        share(number, request, worker.agreement)
        return request

    try:
        worker.serve(receive)
    except BrokenPipeError:
        sys.exit(1)  # the parent is gone; the launcher ends the other ranks
    finally:
        channel.close()


if __name__ == "__main__":
    main()
