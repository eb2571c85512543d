"""The layouts of so many GPUs, each with memory and time of a step and a sync."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep.backends.megatron.plan.capacity import on_gpu
from lockstep.cli.plan.ceilings import ADAPTER_SYNC_S, CONTEXT_BYTES, SERVED, SYNC_S, Device
from lockstep.cli.plan.work import WIDTH, Memory, Model, Ranks, Step, memory, seconds
from lockstep.config.megatron import Parallel
from lockstep.errors import ConfigError
from lockstep.inference.launch import LoraServing
from lockstep.models.parallel_sizes import check_parallel


@dataclass(frozen=True)
class Asked:
    """What is to be planned.

    gpus: of all hosts. context: tokens of a sequence. sequences: of a step.
    merged: the weights travel, else the adapter.
    network: bytes per second between hosts; None: not known.
    """

    gpus: int
    context: int
    sequences: int
    merged: bool
    network: float | None
    device: Device


@dataclass(frozen=True)
class Layout:
    """servers: replicas, each on `server_gpus` GPUs.

    cache_tokens: what the KV cache of a server holds.
    step_s, sync_s: None where nothing like it was measured. sync_s is of all servers.
    """

    ranks: Ranks
    servers: int
    server_gpus: int
    memory: Memory
    cache_tokens: int
    step_s: float | None
    sync_s: float


def layouts(model: Model, asked: Asked) -> list[Layout]:
    """One for each division of the GPUs between trainer and servers: the fastest trainer that fits, and
    the smallest servers. Where no time is known, the trainer that splits the model least.

    Raises ConfigError where nothing fits.
    """
    device = asked.device
    if asked.gpus < 2:
        raise ConfigError("--gpus: give at least 2, since trainer and server are planned on GPUs of their own")
    if asked.gpus > device.per_host and asked.network is None:
        raise ConfigError(
            f"--gpus {asked.gpus} are more than a host's {device.per_host}, and nothing was measured between hosts: give "
            "--network with what nccl-tests' all_reduce_perf shows there, in GB/s"
        )
    made = [layout for trainer in _powers(asked.gpus - 1) if (layout := _best(model, asked, trainer)) is not None]
    if not made:
        raise ConfigError(
            f"--gpus {asked.gpus} do not hold the model with --context {asked.context}: give more GPUs, or a shorter context"
        )
    return made


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


def _best(model: Model, asked: Asked, trainer: int) -> Layout | None:
    """The layout with so many GPUs for the trainer; None where nothing fits."""
    served = _served(model, asked, asked.gpus - trainer)
    step = Step(asked.sequences * asked.context, asked.context, asked.sequences, asked.context / 2)
    room = asked.device.memory - CONTEXT_BYTES
    fitting = []
    for ranks in _ranks(model, asked, trainer):
        needed = memory(model, step, ranks, room)
        if needed.peak <= room:
            network = asked.network if ranks.gpus > asked.device.per_host else None
            fitting.append((ranks, needed, seconds(model, step, ranks, needed.recomputed, asked.device, network)))
    if served is None or not fitting:
        return None
    gpus, tokens = served
    servers = (asked.gpus - trainer) // gpus
    ranks, needed, step_s = min(
        fitting, key=lambda fits: (fits[2] is None, fits[2] or 0.0, fits[0].tensor * fits[0].pipeline)
    )
    return Layout(ranks, servers, gpus, needed, tokens, step_s, servers * _sync_s(model, asked))


def _ranks(model: Model, asked: Asked, gpus: int) -> Iterator[Ranks]:
    """The ways to split a trainer over `gpus`. Tensor ranks are on one host."""
    for tensor in _powers(min(gpus, asked.device.per_host)):
        for pipeline in _powers(gpus // tensor):
            data, expert = gpus // (tensor * pipeline), tensor if model.config.is_moe else 1
            try:
                check_parallel(model.config, Parallel(tensor=tensor, pipeline=pipeline, data=data, expert=expert))
            except ConfigError:
                continue
            if data <= asked.sequences:
                yield Ranks(tensor, pipeline, data, expert, sequence=tensor > 1)


def _served(model: Model, asked: Asked, gpus: int) -> tuple[int, int] | None:
    """(GPUs of a server, tokens that its KV cache holds) of the smallest servers that use all `gpus`."""
    adapters = 0 if asked.merged else LoraServing.model_fields["max_loras"].default * model.adapter
    for size in _powers(min(gpus, asked.device.per_host)):
        if gpus % size or model.config.heads % size:
            continue
        weights = (model.parameters + adapters) * WIDTH // size
        budget = int(SERVED * asked.device.memory)
        capacity = on_gpu(model.config, "bfloat16", budget, True, size, weights, None, None)
        if (capacity.cache_tokens or 0) >= asked.context:
            return size, capacity.cache_tokens or 0
    return None


def _sync_s(model: Model, asked: Asked) -> float:
    """Of one server."""
    link = asked.device.link if asked.gpus <= asked.device.per_host else min(asked.network or 0.0, asked.device.link)
    nbytes = (model.parameters if asked.merged else model.adapter) * WIDTH
    return (SYNC_S if asked.merged else ADAPTER_SYNC_S) + nbytes / link
