"""The trainer's weights on their way to the server: every rank merges and sends what it holds, and
nothing is gathered.

Adapters are merged in fp32 from the unchanged base weights into a tensor of its own, which is
rounded once. Nothing is ever merged into the model or taken out of the model. With all weights
trained, they travel as they are. On a GPU the merge of one parameter runs while the ones before it
travel.

Shapes: E experts, O output rows, R LoRA rank, I input columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.engine.build import sizes_here
from lockstep.engine.export.merge import merge
from lockstep.engine.parallel import device
from lockstep.engine.state import TrainerState
from lockstep.engine.weight_sync.plan import SyncPlan, plan_sources
from lockstep.engine.weight_sync.sender import Endpoint, Pushers, WeightPusher
from lockstep.engine.weight_sync.sender_group import SenderGroup
from lockstep.engine.weight_sync.sources import Supply, share_sources
from lockstep.engine.weight_sync.transports import make_transport
from lockstep.models.checkpoint.load import kept_dtype
from lockstep.models.checkpoint.read import expected_tensors
from lockstep.models.checkpoint.shares import share_out
from lockstep.models.contract import Shard, Sizes
from lockstep.models.parallel_sizes import stage_layers
from lockstep.trainer.protocol import SyncReport

BUCKET_BYTES = {True: 128 << 20, False: 16 << 20}
"""On a GPU, else: large enough for the link, and small enough that the first and the last bucket
cost little, since nothing overlaps them.
"""


class WeightsOut:
    """Sends the merged weights of each step to the server.

    All ranks make it together, once: every sync of a run uses the same plan and connection.
    """

    def __init__(self, trainer: TrainerState, senders: SenderGroup) -> None:
        self.trainer, self.senders = trainer, senders
        self.parameters: dict[str, Tensor] = dict(trainer.model.named_parameters())
        shapes = expected_tensors(trainer.handler, trainer.config, trainer.checkpoint.layout)
        shares = share_out(_everyones_shards(trainer), shapes)
        described = [
            [
                described
                for share in members
                for described in share_sources(
                    share, shapes, kept_dtype(trainer.checkpoint, share.shard, trainer.dtype)
                )
            ]
            for members in shares
        ]
        bucket_bytes = BUCKET_BYTES[device.CUDA]
        self.plan = SyncPlan(tuple(plan_sources([source for source, _ in pairs], bucket_bytes) for pairs in described))
        self.supplies = [(source.key, supply) for source, supply in described[senders.rank]]
        self.pushers: Pushers[WeightPusher] = Pushers()

    def push(
        self, endpoint: Endpoint, version: str, transport: str, deadline_s: float, others: Sequence[str] = ()
    ) -> SyncReport:
        """Make the server hold this trainer's weights and serve them as `version`, and as nothing
        else. Collective.

        transport: a name of `lockstep_wire.transports`.
        deadline_s: of every wait for the server.
        others: addresses of other servers, to which connections are kept.

        Returns the SyncReport. Raises ServerError, WeightsError or MismatchError, on every rank;
        the server then serves what it served before, or was ended (ServerLostError).
        """

        def connected() -> WeightPusher:
            return WeightPusher(
                endpoint,
                make_transport(transport, deadline_s),
                self.plan,
                skipped=[prefix for prefix, _ in self.trainer.handler.spec.skipped],
                device=device.device(),
                deadline_s=deadline_s,
                senders=self.senders,
            )

        return self.pushers.to(endpoint, (transport, deadline_s), others, connected).push(
            self.tensors(), version, version
        )

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's sources, merged, one at a time."""
        for key, supply in self.supplies:
            yield key, self._merged(supply)

    def _merged(self, supply: Supply) -> Tensor:
        """A parameter (or some experts of it) with its adapter's product added."""
        owner, _, leaf = supply.name.rpartition(".")
        module = self.trainer.model.get_submodule(owner)
        weight = self.parameters[supply.name].detach()
        slot = "adapter" if supply.experts is None else f"{leaf}_adapter"
        adapter: Any = getattr(module, slot, None) if leaf == "weight" or supply.experts is not None else None
        chosen = slice(None) if supply.experts is None else slice(*supply.experts)
        if adapter is None:
            return weight[chosen]
        if supply.experts is None:
            return merge(weight, adapter.blocked_b(), adapter.stacked_a(), adapter.scale)
        a_ERI, b_EOR = adapter.stacked()
        return merge(weight[chosen], b_EOR[chosen], a_ERI[chosen], adapter.scale)


def _everyones_shards(trainer: TrainerState) -> list[list[Shard]]:
    """Each rank's parameters, in rank order; what a rank holds follows from its sizes and
    coordinates.
    """
    sizes_S = torch.tensor(astuple(sizes_here()), device=device.device())
    gathered = [torch.empty_like(sizes_S) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, sizes_S)
    config, layout = trainer.config, trainer.checkpoint.layout
    stages = stage_layers(config.layers, trainer.parallel.pipeline, trainer.settings.stages)
    sizes = [Sizes(*row.tolist()) for row in gathered]
    return [trainer.handler.shards(config, layout, rank_sizes, stages[rank_sizes.pp_rank]) for rank_sizes in sizes]
