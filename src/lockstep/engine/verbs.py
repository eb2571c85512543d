"""The work of each trainer verb on one rank. `trainer/protocol.py` has the requests and answers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from lockstep.batching.pack import load_batch
from lockstep.engine.export.adapters import AdaptersOut
from lockstep.engine.export.merged_weights import WeightsOut
from lockstep.engine.losses.check import check_loss
from lockstep.engine.memory import offload
from lockstep.engine.parallel import device
from lockstep.engine.parallel.coordination import Agreement
from lockstep.engine.state import TrainerState, load_step, save_step, start_from
from lockstep.engine.steps.score import score_and_rank
from lockstep.engine.steps.train_step import expert_choices_that_differ, train_step
from lockstep.engine.weight_sync.control import Endpoint
from lockstep.engine.weight_sync.sender_group import StoreSenderGroup
from lockstep.errors import ConfigError, TrainerError
from lockstep.trainer import protocol
from lockstep.trainer.protocol import SCORING, Request

Report = Callable[[dict[str, Any]], None]


class Verbs:
    """One rank's model, and what it keeps between requests: connections to the server, and what
    lies on the host.
    """

    def __init__(self, trainer: TrainerState, agreement: Agreement) -> None:
        self.trainer, self.agreement = trainer, agreement
        self.weights_out: WeightsOut | None = None
        self.adapters_out: AdaptersOut | None = None
        self.offloaded: offload.Offload | None = None
        self.handlers: dict[str, Callable[[Any, Report], Any]] = {
            protocol.TrainStep.verb: self.train_step,
            protocol.Score.verb: self.score,
            protocol.Load.verb: self.load,
            protocol.StartFrom.verb: self.start_from,
            protocol.Save.verb: self.save,
            protocol.SyncWeights.verb: self.sync_weights,
            protocol.SyncAdapter.verb: self.sync_adapter,
            protocol.Offload.verb: self.offload,
            protocol.Onload.verb: self.onload,
            protocol.Release.verb: self.release,
            protocol.Memory.verb: self.memory,
        }

    def run(self, request: Request[Any], report: Report) -> Any:
        """The verb's answer. Raises ConfigError or TrainerError where it can't run now."""
        if not self.trainer.settings.trains and request.verb not in SCORING:
            raise ConfigError(
                f"this trainer was started to score only: {request.verb} needs one with trains = true in engine.json"
            )
        self._check_here(request.verb)
        return self.handlers[request.verb](request, report)

    def train_step(self, request: protocol.TrainStep, report: Report) -> protocol.Trained:
        config, reference = request.config, request.reference
        if (config.kl_coef > 0) != (reference is not None):
            raise ConfigError(f"kl_coef = {config.kl_coef} needs a reference step if and only if it is above 0")
        check_loss(config.policy_loss)
        batch = load_batch(request.batch)
        metrics = train_step(self.trainer, batch, config, reference, report, request.logprobs)
        check_finite(metrics)
        if request.out is None:
            return protocol.Trained(metrics)
        return protocol.Trained(metrics, self.save(protocol.Save(request.out), report).files)

    def score(self, request: protocol.Score, report: Report) -> protocol.Scored:
        scores = score_and_rank(self.trainer, load_batch(request.batch), report, request.top)
        choices = expert_choices_that_differ(self.trainer)
        if self.agreement.rank == 0:
            save_file(scores, request.out)
        return protocol.Scored(len(scores["logprobs_RS"]), **choices)

    def load(self, request: protocol.Load, report: Report) -> protocol.Loaded:
        return protocol.Loaded(load_step(self.trainer, request.step_dir))

    def start_from(self, request: protocol.StartFrom, report: Report) -> protocol.Done:
        start_from(self.trainer, request.adapter)
        return protocol.Done()

    def save(self, request: protocol.Save, report: Report) -> protocol.Saved:
        report({"kind": "phase", "phase": "save", "waits_for": "the disk"})
        on_host = self.offloaded.on_host if self.offloaded else None
        return protocol.Saved(save_step(self.trainer, request.out, on_host))

    def sync_weights(self, request: protocol.SyncWeights, report: Report) -> protocol.SyncReport:
        report({"kind": "phase", "phase": "sync", "waits_for": "the server"})
        if self.weights_out is None:
            self.weights_out = WeightsOut(self.trainer, self._senders("sync"))
        where = request.transport, request.deadline_s, request.others
        return self.weights_out.push(_server(request), request.version, *where)

    def sync_adapter(self, request: protocol.SyncAdapter, report: Report) -> protocol.SyncReport:
        report({"kind": "phase", "phase": "sync", "waits_for": "the server"})
        if self.adapters_out is None:
            self.adapters_out = AdaptersOut(self.trainer, self._senders("adapters"), request.deadline_s)
        where = request.transport, request.deadline_s, request.others
        return self.adapters_out.push(_server(request), request.version, *where)

    def offload(self, request: protocol.Offload, report: Report) -> protocol.Moved:
        return protocol.Moved(self._offload().out(keep_weights=request.keep_weights))

    def onload(self, request: protocol.Onload, report: Report) -> protocol.Moved:
        return protocol.Moved(self._offload().back())

    def release(self, request: protocol.Release, report: Report) -> protocol.Done:
        device.release_memory()
        return protocol.Done()

    def memory(self, request: protocol.Memory, report: Report) -> protocol.MemoryReport:
        here = self._offload().memory()
        least = torch.tensor(here["device_free"], dtype=torch.int64, device=device.device())
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return protocol.MemoryReport(**here | {"device_free": int(least)}, resident=resident_bytes())

    def _senders(self, name: str) -> StoreSenderGroup:
        return StoreSenderGroup(self.agreement.store, self.agreement.rank, self.agreement.world, name)

    def _offload(self) -> offload.Offload:
        if self.offloaded is None:
            self.offloaded = offload.Offload(self.trainer)
        return self.offloaded

    def _check_here(self, verb: str) -> None:
        """Raise TrainerError when `verb` needs memory that was moved to the host."""
        state = self.offloaded.state if self.offloaded else "here"
        works = {"here": self.handlers.keys(), "weights": {"score", "sync", "sync_adapter"}, "away": set()}
        if verb not in works[state] | {"save", "offload", "onload", "memory"}:
            raise TrainerError(f"{verb} needs memory that is on the host while the server has the device: onload first")


def _server(request: protocol.SyncWeights | protocol.SyncAdapter) -> Endpoint:
    """Only rank 0 speaks to the server, and only rank 0 is given the server's token."""
    return Endpoint(request.root_url, request.api_key)


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raise TrainerError naming the first metric that is not finite. The weights have changed by
    then: the step can't be published.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainerError(
                f"the step's {name} is {value}: what was trained is too far from what was sampled for fp32 to say; "
                "set max_mismatch to refuse such steps, or lower the learning rate"
            )


def resident_bytes() -> int:
    """The host memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
