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
    """GPU numbers; empty: the CPU. shared: trainer and server take turns on them.

    inference: of all servers. split: of each, where there are several.
    """

    trainer: tuple[int, ...] = ()
    inference: tuple[int, ...] = ()
    colocated: bool = False
    split: tuple[tuple[int, ...], ...] = ()

    @property
    def servers(self) -> tuple[tuple[int, ...], ...]:
        """The GPUs of each server."""
        return self.split or (self.inference,)

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        """The kind of server environment: "cuda" or "cpu"."""
        return "cuda" if self.inference else "cpu"


def resolve_placement(placement: Placement | None, replicas: int | None = None) -> Devices:
    """The devices of trainer and servers.

    placement: what the user asks for. None: the trainer gets GPU 0 and the server GPU 1. A machine
        with one GPU shares that GPU, and a machine without GPUs runs both on the CPU.
    replicas: servers. Several get a GPU each, from GPU 1 on.

    GPUs are counted among those that CUDA_VISIBLE_DEVICES leaves to this process.
    Raises ConfigError for what this machine lacks.
    """
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    seen = seen_gpus()
    if seen is not None:
        count = min(count, len(seen))
    if placement is None:
        if (replicas or 1) > 1:
            return _beside_gpu_0(replicas or 1, count)
        return (Devices(), Devices((0,), (0,), colocated=True), Devices((0,), (1,)))[min(count, 2)]
    servers = _servers(placement, replicas)
    if placement.trainer == "cpu" or placement.inference == "cpu":
        return Devices(colocated=True)
    inference = tuple(number for server in servers for number in server)
    wanted = max(*placement.trainer, *inference)
    has = "this machine has" if seen is None else "CUDA_VISIBLE_DEVICES leaves"
    if wanted >= count:
        raise ConfigError(
            f"placement names GPU {wanted}, {has} {count}: choose from 0 to {count - 1}"
            if count
            else f"placement names GPUs, {has} none: leave placement out to run on the CPU"
        )
    # Shared ones in one order: a handle of GPU memory says which it is by the number that its own
    # process gives it.
    trainer = inference if placement.colocated else placement.trainer
    return Devices(trainer, inference, placement.colocated, servers if len(servers) > 1 else ())


def _beside_gpu_0(replicas: int, count: int) -> Devices:
    """Servers on the CPU where there is no GPU, else on GPU 1 and those after it."""
    if count == 0:
        return Devices(split=((),) * replicas)
    if count <= replicas:
        raise ConfigError(
            f"replicas = {replicas} need a GPU each and one for the trainer, this machine has {count}: use replicas = {max(count - 1, 1)}"
        )
    gpus = tuple(range(1, replicas + 1))
    return Devices((0,), gpus, split=tuple((number,) for number in gpus))


def _servers(placement: Placement, replicas: int | None) -> tuple[tuple[int, ...], ...]:
    """The GPUs of each server. Raises ConfigError where `replicas` does not fit them."""
    servers = placement.servers
    if replicas in (None, len(servers)):
        return servers
    (gpus,) = servers if len(servers) == 1 else ((),)
    if placement.colocated:
        raise unsupported(
            "replicas", replicas, "MegatronBackend", "trainer and server share devices: leave placement out"
        )
    if not gpus or len(gpus) % replicas:
        raise ConfigError(
            f"replicas = {replicas} does not fit placement.inference = {placement.inference}: give as many lists as replicas, or a "
            "number of GPUs that they divide"
        )
    each = len(gpus) // replicas
    return tuple(gpus[start : start + each] for start in range(0, len(gpus), each))


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
