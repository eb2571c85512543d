"""The location of a run's trainer and server: GPUs of this machine or its CPU, shared or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lockstep.config.base import unsupported
from lockstep.config.megatron import Parallel, Placement, fitting_transports
from lockstep.errors import ConfigError
from lockstep.process.child import seen_gpus


@dataclass(frozen=True)
class Devices:
    """GPU numbers; empty: the CPU. shared: trainer and server take turns on them."""

    trainer: tuple[int, ...] = ()
    inference: tuple[int, ...] = ()
    colocated: bool = False

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        """The kind of server environment: "cuda" or "cpu"."""
        return "cuda" if self.inference else "cpu"


def resolve_placement(placement: Placement | None) -> Devices:
    """The devices of trainer and server.

    placement: what the user asks for. None: the trainer gets GPU 0 and the server GPU 1. A machine
        with one GPU shares that GPU, and a machine without GPUs runs both on the CPU.

    GPUs are counted among those that CUDA_VISIBLE_DEVICES leaves to this process.
    Raises ConfigError for what this machine lacks.
    """
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    seen = seen_gpus()
    if seen is not None:
        count = min(count, len(seen))
    if placement is None:
        return (Devices(), Devices((0,), (0,), colocated=True), Devices((0,), (1,)))[min(count, 2)]
    if placement.trainer == "cpu" or placement.inference == "cpu":
        return Devices(colocated=True)
    wanted = max(*placement.trainer, *placement.inference)
    has = "this machine has" if seen is None else "CUDA_VISIBLE_DEVICES leaves"
    if wanted >= count:
        raise ConfigError(
            f"placement names GPU {wanted}, {has} {count}: choose from 0 to {count - 1}"
            if count
            else f"placement names GPUs, {has} none: leave placement out to run on the CPU"
        )
    # Shared ones in one order: a handle of GPU memory says which it is by the number that its own
    # process gives it.
    trainer = placement.inference if placement.colocated else placement.trainer
    return Devices(trainer, placement.inference, placement.colocated)


def check_processes(devices: Devices, parallel: Parallel) -> None:
    """Raise ConfigError unless every trainer process has a GPU of its own, and every GPU a process."""
    gpus, processes = len(devices.trainer), parallel.processes
    if gpus and gpus != processes:
        raise ConfigError(
            f"the trainer has {gpus} GPU{'s' * (gpus > 1)} (placement) and {processes} process{'es' * (processes > 1)} (parallel: "
            "tensor x pipeline x data x context): give as many of one as of the other"
        )


def resolve_transport(transport: str | None, devices: Devices) -> str:
    """The transport of weights and adapters. None: the one that fits best.

    Raises ConfigError for one that can't work there.
    """
    fitting = fitting_transports(devices.kind, devices.colocated)
    if transport not in (None, *fitting):
        known = " or ".join(map(repr, fitting))
        raise unsupported("weight_transport", transport, "MegatronBackend", f"here it is {known}")
    return transport or fitting[0]
