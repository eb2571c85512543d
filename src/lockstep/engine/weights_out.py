"""The trainer's weights on their way to the server: merged by the rank that holds them, gathered on rank 0, streamed from there.

Adapters are merged in fp32 from the base weights, which the model keeps unchanged, into a tensor of its own that is rounded once;
nothing is ever merged into the model or taken out of it again. With all weights trained, they travel as they are.

Shapes: R LoRA rank, I input columns, O output rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.engine import device
from lockstep.engine.build import sizes_here
from lockstep.engine.session import Session
from lockstep.engine.trainable import Trainable
from lockstep.errors import ConfigError
from lockstep.families.checkpoint import expected_tensors
from lockstep.families.contract import Piece, Shard, Sizes
from lockstep.families.rules import stage_layers
from lockstep.families.weights import ExportStep, assemble, merged, plan_export
from lockstep.sync.plan import TensorMeta, make_plan
from lockstep.sync.push import Endpoint, WeightPusher
from lockstep.sync.transports import GlooTransport


class WeightsOut:
    """Made once on every rank (collective) and kept: the plan and the connection serve every sync of a run."""

    def __init__(self, session: Session) -> None:
        """Raises ConfigError on GPUs: gloo carries weights between CPU processes only."""
        if device.CUDA:
            raise ConfigError(
                "weights can't be streamed from a GPU yet; use rollout_weights_mode 'lora', or run on the CPU"
            )
        self.session, self.rank, self.world = session, dist.get_rank(), dist.get_world_size()
        self.parameters: dict[str, Tensor] = dict(session.model.named_parameters())
        self.shards = [{shard.megatron: shard for shard in held} for held in _everyones_shards(session)]
        shapes = expected_tensors(session.handler, session.config, session.checkpoint.layout)
        self.steps = plan_export([list(held.values()) for held in self.shards], shapes)
        self.pairs = _pairs(session) if session.settings.lora is not None else {}
        self.pusher: WeightPusher | None = None
        self.serves: tuple[Endpoint, float] | None = None

    def push(self, endpoint: Endpoint, version: str, deadline_s: float) -> dict[str, float | str]:
        """Make the server hold this trainer's weights and serve them as `version`, and as nothing else. Collective.

        deadline_s: of every wait for the server. Returns rank 0's SyncReport; nothing on other ranks. Raises ServerError, WeightsError
        or MismatchError, on rank 0; the server then serves what it served before, and the other ranks are not left waiting.
        """
        if self.rank:
            self._supply()
            return {}
        stream = self.tensors()
        try:
            return asdict(self._pusher(endpoint, deadline_s).push(stream, version, version))
        finally:
            if self.world > 1:
                for _ in stream:  # after a failure: the other ranks wait until each of their tensors is taken
                    pass

    def _pusher(self, endpoint: Endpoint, deadline_s: float) -> WeightPusher:
        if self.pusher is None or self.serves != (endpoint, deadline_s):
            if self.pusher is not None:
                self.pusher.close()
            plan = make_plan(list(_metas(self.steps, self.session.dtype)))
            self.pusher = WeightPusher(endpoint, GlooTransport(deadline_s), plan, deadline_s=deadline_s)
            self.serves = endpoint, deadline_s
        return self.pusher

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Rank 0: every Hugging Face tensor of the model, merged; the other ranks must be in `push` at the same time."""
        for step in self.steps:
            yield from assemble(step, self._take).items()

    def _take(self, rank: int, name: str) -> Tensor:
        if rank == self.rank:
            return self._merged(name)
        tensor = torch.empty(self.shards[rank][name].shape, dtype=self.session.dtype)
        dist.recv(tensor, rank)
        return tensor

    def _supply(self) -> None:
        for step in self.steps:
            for rank, name in step.sources:
                if rank == self.rank:
                    dist.send(self._merged(name).contiguous(), 0)

    @torch.no_grad()
    def _merged(self, name: str) -> Tensor:
        """One parameter of this rank with its adapters' product added."""
        weight, lora = self.parameters[name].detach(), self.session.settings.lora
        if lora is None:
            return weight
        shard = self.shards[self.rank][name]
        names = [f"{site.module}.lora_{side}" for site in shard.sites for side in "AB"]
        adapter = {one: _whole(one, self.pairs[one]) for one in names if one in self.pairs}
        return merged(shard, weight, adapter, lora.alpha / lora.rank)


def _everyones_shards(session: Session) -> list[list[Shard]]:
    """Each rank's parameters, in rank order; what a rank holds follows from its sizes and coordinates."""
    mine = torch.tensor(astuple(sizes_here()))
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    config, layout = session.config, session.checkpoint.layout
    stages = stage_layers(config.layers, session.parallel.pipeline, session.settings.stages)
    sizes = [Sizes(*one.tolist()) for one in everyones]
    return [session.handler.shards(config, layout, one, stages[one.pp_rank]) for one in sizes]


def _metas(steps: list[ExportStep], dtype: torch.dtype) -> Iterator[TensorMeta]:
    """The stream's names in the order of `assemble`."""
    for step in steps:
        for name in dict.fromkeys(copy.piece.name for copy in step.copies):
            assert name is not None
            yield TensorMeta(name, dtype, tuple(step.shapes[name]))


Held = list[tuple[Trainable, int, Piece]]
"""Parts of one adapter matrix: rows of a parameter (a stack of experts flattened) from the given one on."""


def _pairs(session: Session) -> Mapping[str, Held]:
    """What this rank holds of each adapter matrix, by canonical name: always what its own part of the weight needs."""
    found: dict[str, Held] = {}
    for trainable in session.trainables:
        at = 0
        for piece in trainable.pieces:
            if piece.name is not None:
                found.setdefault(piece.name, []).append((trainable, at, piece))
            at += piece.rows
    return found


def _whole(name: str, held: Held) -> Tensor:
    """An adapter matrix at its full shape, fp32, zero where another rank holds it."""
    whole = torch.zeros(held[0][0].shapes[name])
    for trainable, at, piece in held:
        rows = trainable.parameter.detach().reshape(-1, trainable.row_width)[at : at + piece.rows]
        whole[piece.start : piece.stop, slice(piece.col_start, piece.col_stop)] = rows
    return whole
