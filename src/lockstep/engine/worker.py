"""The trainer process: `python -m lockstep.engine.parallel.launch N -m lockstep.engine.worker --config engine.json --socket PATH`.

Rank 0 speaks to the parent (`protocol.py`), every rank runs every verb. Verbs and their arguments:
  train_step {batch, config, out, reference}  -> {"metrics": {...}, "files": [...]}   reference: a step folder, needed iff kl_coef > 0;
                                                 out: as for save, or null: no files are written, `save` is to follow
  score      {batch, out, top}                -> {"rows": R}   writes logprobs_RS, float32, NaN where nothing is predicted; with
                                                 top = C also top_RSC, int32, the C most likely ids there;
                                                 with replayed routes also picks_differ: the share that is not the live router's
  load       {step_dir}                       -> {"updates": n}
  save       {out}                            -> {"files": [...]}
  sync       {root_url, version, transport, deadline_s}, secret {api_key}
                                              -> the fields of a SyncReport (`weight_sync/sender.py`)   the server holds the
                                                 (merged) weights as `version`, or, after an error, what it held before
  sync_adapter                                   the same arguments; the server has the adapter, from memory, as model `version` beside
                                                 those it serves; -> the fields of a SyncReport
  offload    {keep_weights}                   -> {"nbytes"}   memory of the device to the host; save works on from there, with
                                                 keep_weights score and sync do too, else only onload and memory
  onload     {}                               -> {"nbytes"}
  release    {}                               -> {}   the device gets back what torch keeps of it for later; nothing moves
  memory     {}                               -> bytes of rank 0: see Offload.memory; device_free: of the rank that has least
  shutdown   {}                               -> {}
A verb that fails leaves the worker usable; when weights were already changed it refuses to go on until `load`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Import order matters: `device` prepares torch for Megatron before anything else loads it.
from lockstep.engine.parallel import device  # isort: skip
from lockstep.engine.export.adapters import AdaptersOut
from lockstep.engine.export.merged_weights import WeightsOut
from lockstep.engine.memory.offload import Offload
from lockstep.engine.parallel.coordination import LOST, Agreement
from lockstep.engine.state import Session, Settings, load_step, open_session, save_step
from lockstep.engine.train_step import picks_that_differ, score_and_rank, train_step
from lockstep.errors import ConfigError, LockstepError, TrainerError
from lockstep.trainer import protocol
from lockstep.weight_sync.control import Endpoint
from lockstep.weight_sync.sender_group import StoreCrew

HEARTBEAT_S = 5.0
SHUTDOWN_S = 10.0
DEFAULT_TIMEOUT_S = 24 * 3600.0

SCORING = frozenset({"score", "memory", "offload", "onload", "release"})
"""Verbs of a trainer that does not train."""

Json = dict[str, Any]


class Silent:
    """What ranks other than 0 have in place of a channel."""

    def send(self, message: Json) -> None:
        """Nothing: the parent listens to rank 0 only."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class Worker:
    """One rank between start and shutdown. `stale`: weights differ from the last step the parent knows of."""

    session: Session
    channel: protocol.Channel | Silent
    agreement: Agreement
    stale: bool = False
    weights_out: WeightsOut | None = None
    adapters_out: AdaptersOut | None = None
    offloaded: Offload | None = None

    def verbs(self) -> dict[str, Callable[[Json, Callable[[Json], None]], Json]]:
        return {
            "train_step": self.train_step,
            "score": self.score,
            "load": self.load,
            "save": self.save,
            "sync": self.sync,
            "sync_adapter": self.sync_adapter,
            "offload": self.offload,
            "onload": self.onload,
            "release": self.release,
            "memory": self.memory,
        }

    def train_step(self, args: Json, report: Callable[[Json], None]) -> Json:
        from lockstep.batching.pack import load_batch
        from lockstep.config.train import TrainConfig

        config = TrainConfig(**args["config"])
        reference = Path(args["reference"]) if args.get("reference") else None
        if (config.kl_coef > 0) != (reference is not None):
            raise ConfigError(f"kl_coef = {config.kl_coef} needs a reference step if and only if it is above 0")
        metrics = train_step(self.session, load_batch(Path(args["batch"])), config, reference, report)
        check_finite(metrics)
        return {"metrics": metrics, **({} if args["out"] is None else self.save(args, report))}

    def score(self, args: Json, report: Callable[[Json], None]) -> Json:
        from safetensors.numpy import save_file

        from lockstep.batching.pack import load_batch

        count = int(args.get("top") or 0)
        values_RS, top_RSC = score_and_rank(self.session, load_batch(Path(args["batch"])), report, count)
        picks = picks_that_differ(self.session)
        if self.agreement.rank == 0:
            save_file({"logprobs_RS": values_RS} | ({} if top_RSC is None else {"top_RSC": top_RSC}), args["out"])
        return {"rows": len(values_RS), **picks}

    def load(self, args: Json, report: Callable[[Json], None]) -> Json:
        result = load_step(self.session, Path(args["step_dir"]))
        self.stale = False
        return result

    def save(self, args: Json, report: Callable[[Json], None]) -> Json:
        report({"kind": "phase", "phase": "save"})
        return save_step(self.session, Path(args["out"]), self.offloaded.on_host if self.offloaded else None)

    def sync(self, args: Json, report: Callable[[Json], None]) -> Json:
        report({"kind": "phase", "phase": "sync"})
        if self.weights_out is None:
            crew = StoreCrew(self.agreement.store, self.agreement.rank, self.agreement.world)
            self.weights_out = WeightsOut(self.session, crew)
        return self.weights_out.push(endpoint_of(args), args["version"], args["transport"], float(args["deadline_s"]))

    def sync_adapter(self, args: Json, report: Callable[[Json], None]) -> Json:
        report({"kind": "phase", "phase": "sync"})
        if self.adapters_out is None:
            crew = StoreCrew(self.agreement.store, self.agreement.rank, self.agreement.world, "adapters")
            self.adapters_out = AdaptersOut(self.session, crew, float(args["deadline_s"]))
        return self.adapters_out.push(endpoint_of(args), args["version"], args["transport"], float(args["deadline_s"]))

    def offload(self, args: Json, report: Callable[[Json], None]) -> Json:
        return {"nbytes": self._offload().out(keep_weights=bool(args.get("keep_weights")))}

    def onload(self, args: Json, report: Callable[[Json], None]) -> Json:
        return {"nbytes": self._offload().back()}

    def release(self, args: Json, report: Callable[[Json], None]) -> Json:
        device.release_memory()
        return {}

    def memory(self, args: Json, report: Callable[[Json], None]) -> Json:
        found = self._offload().memory()
        least = torch.tensor(found["device_free"], dtype=torch.int64, device=device.device())
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return found | {"device_free": int(least), "resident": resident_bytes()}

    def _offload(self) -> Offload:
        if self.offloaded is None:
            self.offloaded = Offload(self.session)
        return self.offloaded

    def _check_here(self, verb: str) -> None:
        """Raise TrainerError when `verb` needs memory that was moved to the host."""
        state = self.offloaded.state if self.offloaded else "here"
        works = {"here": self.verbs().keys(), "weights": {"score", "sync", "sync_adapter"}, "away": set()}
        if verb not in works[state] | {"save", "offload", "onload", "memory"}:
            raise TrainerError(f"{verb} needs memory that is on the host while the server has the device: onload first")

    def serve(self, receive: Callable[[int], Json]) -> None:
        """Answer requests until shutdown. `receive(n)` gives the n-th request."""
        number = 1
        while True:
            request = receive(number)
            if request.get("verb") == "shutdown":
                self.agreement.settle(number, None, SHUTDOWN_S)  # rank 0 holds the store: it leaves last
                if request["id"] >= 0:  # below: the parent has gone, and nobody listens
                    self.channel.send(protocol.result(request["id"], {}))
                return
            self.answer(number, request)
            if self.agreement.rank == 0 and number > 2:
                self.agreement.forget(number - 2)
            number += 1

    def answer(self, number: int, request: Json) -> None:
        """Run one verb on this rank, agree on its outcome with the others, and reply."""
        identity, timeout_s = int(request["id"]), float(request.get("timeout_s") or DEFAULT_TIMEOUT_S)
        before, result, error = self.session.optimizer.count, None, None

        def give_up(why: str) -> None:
            self.channel.send(protocol.error(identity, "TrainerError", f"rank {self.agreement.rank} was lost: {why}"))

        with self.agreement.watched(number, timeout_s, give_up), heartbeat(self.channel, identity) as report:
            try:
                result = self.run(request, report)
            except Exception as caught:  # noqa: BLE001 (the boundary: every failure becomes a reply)
                error = describe(caught, self.agreement.rank)
        error = self.agreement.settle(number, error, timeout_s)
        if error is None:
            self.channel.send(protocol.result(identity, result or {}))
            return
        self.stale = self.stale or self.session.optimizer.count != before
        self.channel.send(protocol.error(identity, error["type"], error["message"], error["traceback"]))
        if error.get("fatal"):
            os._exit(LOST)

    def run(self, request: Json, report: Callable[[Json], None]) -> Json:
        verb, args = request.get("verb"), (request.get("args") or {}) | (request.get("secret") or {})
        verbs = self.verbs()
        if verb not in verbs:
            raise ConfigError(f"unknown verb {verb!r}; known: {', '.join([*verbs, 'shutdown'])}")
        if self.stale and verb != "load":
            raise TrainerError(
                "an earlier step failed after it had changed the weights; load the last published step first"
            )
        if not self.session.settings.trains and verb not in SCORING:
            raise ConfigError(
                f"this trainer was started to score only: {verb} needs one with trains = true in engine.json"
            )
        self._check_here(str(verb))
        return verbs[verb](args, report)


def share(number: int, request: Json, agreement: Agreement) -> None:
    """Publish a request to the other ranks, without what is for rank 0 alone."""
    agreement.publish(number, {name: value for name, value in request.items() if name != "secret"})


def endpoint_of(args: Json) -> Endpoint:
    """The server. Only rank 0 speaks to it, and only rank 0 is given the server's token."""
    return Endpoint(args["root_url"], args.get("api_key", ""))


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raise TrainerError naming the first metric that is no number. The weights have changed by then: the step can't be published."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainerError(
                f"the step's {name} is {value}: what was trained is too far from what was sampled for fp32 to say; "
                "set max_mismatch to refuse such steps, or lower the learning rate"
            )


def describe(caught: Exception, rank: int) -> dict[str, str]:
    """An exception as a message; a LockstepError is for the user and speaks for itself."""
    known = isinstance(caught, LockstepError)
    text = str(caught) if known else f"rank {rank}: {type(caught).__name__}: {caught}"
    return {"type": type(caught).__name__, "message": text, "traceback": traceback.format_exc()}


class heartbeat:
    """Sends an event every few seconds while a verb runs, with the phase it is in."""

    def __init__(self, channel: protocol.Channel | Silent, identity: int) -> None:
        self.channel, self.identity, self.phase, self.done = channel, identity, "start", threading.Event()

    def report(self, value: Json) -> None:
        self.phase = value.get("phase", self.phase)
        self.channel.send(protocol.event(self.identity, value))

    def __enter__(self) -> Callable[[Json], None]:
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()
        return self.report

    def _beat(self) -> None:
        while not self.done.wait(HEARTBEAT_S):
            self.channel.send(protocol.event(self.identity, {"kind": "heartbeat", "phase": self.phase}))

    def __exit__(self, *_exception: object) -> None:
        self.done.set()
        self.thread.join()


def start(config: Path, channel: protocol.Channel | Silent) -> Worker:
    """Process groups, model, optimizer. Raises LockstepError on every rank if it fails on one."""
    settings = Settings.parse(json.loads(config.read_text()))
    device.start(settings.parallel, settings.seed, settings.timeout_s)
    agreement = Agreement()
    session, error = None, None
    with agreement.watched(
        0, settings.timeout_s, lambda why: channel.send(protocol.error(0, "TrainerError", f"start-up failed: {why}"))
    ):
        try:
            session = open_session(settings)
        except Exception as caught:  # noqa: BLE001 (the boundary: every failure becomes a reply)
            error = describe(caught, agreement.rank)
    error = agreement.settle(0, error, settings.timeout_s)
    if error is not None or session is None:
        channel.send(protocol.error(0, error["type"], error["message"], error["traceback"]) if error else {})
        sys.exit(1)
    return Worker(session, channel, agreement)


def resident_bytes() -> int:
    """What this process holds of the host's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def facts(worker: Worker) -> Json:
    """What the parent may want to know once the worker is ready."""
    parameters = sum(t.parameter.numel() for t in worker.session.trainables)
    return {
        "world": worker.agreement.world,
        "trained_parameters_rank0": parameters,
        "device": str(device.device()),
        "peak_memory_bytes": device.peak_memory(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--socket", required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us through the guard
    leader = os.environ.get("RANK", "0") == "0"
    channel: protocol.Channel | Silent = protocol.connect(arguments.socket) if leader else Silent()
    channel.send({"token": os.environ.pop(protocol.TOKEN_VARIABLE, "")})
    try:
        worker = start(arguments.config, channel)
    except LockstepError as error:
        channel.send(protocol.error(0, type(error).__name__, str(error), traceback.format_exc()))
        sys.exit(error.exit_code)
    channel.send(protocol.result(0, facts(worker)))

    def receive(number: int) -> Json:
        if not isinstance(worker.channel, protocol.Channel):
            return worker.agreement.await_request(number)
        try:
            request = worker.channel.receive()
        except protocol.ChannelClosed:
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
