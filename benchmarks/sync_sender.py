"""One sending rank of `weight_sync.py`: random weights of a shape, split as a trainer of that layout holds them.

    python -m lockstep.engine.parallel.launch N sync_sender.py JOB.json

No Megatron: shares and plan come from the weight contract, tensors are random, so that only the way to the server is measured. With
`merge_rank` each matrix is merged with a random pair of that rank on its way, as in `rollout_weights_mode="merged"`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep.engine.export.merge import merge
from lockstep.engine.parallel.launch import group_settings
from lockstep.engine.weight_sync.plan import SyncPlan, plan_sources
from lockstep.engine.weight_sync.sender import Endpoint, WeightPusher
from lockstep.engine.weight_sync.sender_group import StoreSenderGroup
from lockstep.engine.weight_sync.sources import share_sources
from lockstep.engine.weight_sync.transports import make_transport
from lockstep.models.checkpoint.read import expected_tensors
from lockstep.models.checkpoint.shares import share_out
from lockstep.models.contract import Layout, Sizes
from lockstep.models.registry import get_model_support_handler, load_model_config


class Weights:
    """This rank's sources: random values on its device, and the pairs to merge."""

    def __init__(self, sources: list[Any], merge_rank: int, device: torch.device) -> None:
        self.merge_rank = merge_rank
        self.values, self.pairs = {}, {}
        generator = torch.Generator(device).manual_seed(1)
        for source, supply in sources:
            experts = 1 if supply.experts is None else supply.experts[1] - supply.experts[0]
            shape = (experts, source.rows // experts, source.width)
            value = torch.randn(shape, dtype=source.dtype, device=device, generator=generator).mul_(0.02)
            self.values[source.key] = value if experts > 1 else value[0]
            if merge_rank and source.width > 1 and source.rows // experts > 1:
                a = torch.randn(experts, merge_rank, source.width, dtype=source.dtype, device=device) * 0.01
                b = torch.randn(experts, source.rows // experts, merge_rank, dtype=source.dtype, device=device) * 0.01
                self.pairs[source.key] = (a, b) if experts > 1 else (a[0], b[0])

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        for key, value in self.values.items():
            if key not in self.pairs:
                yield key, value
                continue
            a, b = self.pairs[key]
            yield key, merge(value, b, a, 2.0)


def shards_of(job: dict[str, Any], config: Any, handler: Any, rank: int) -> Any:
    """Tensor-parallel ranks; a mixture's experts are spread over the same ranks."""
    world, moe = job["senders"], config.is_moe
    sizes = Sizes(tp=world, tp_rank=rank, ep=world if moe else 1, ep_rank=rank if moe else 0)
    return handler.shards(config, Layout(), sizes, range(config.layers))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if not job["gpus"] else torch.device("cuda", job["gpus"][rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", **group_settings())
    store = dist.PrefixStore("senders", dist.distributed_c10d._get_default_store())
    senders = StoreSenderGroup(store, rank, world)
    handler, config = get_model_support_handler(job["model"]), load_model_config(job["model"])
    shapes = expected_tensors(handler, config, Layout())
    shares = share_out([shards_of(job, config, handler, rank) for rank in range(world)], shapes)
    dtype = getattr(torch, job["dtype"])
    described = [
        [piece for share in rank_shares for piece in share_sources(share, shapes, dtype)] for rank_shares in shares
    ]
    plan = SyncPlan(tuple(plan_sources([source for source, _ in sender], job["bucket_bytes"]) for sender in described))
    endpoint = Endpoint(job["root_url"], job["api_key"])
    figures = []
    for case in job["cases"]:
        weights = Weights(described[rank], case["merge_rank"], device)
        carrier = make_transport(case["transport"], job["deadline_s"])
        pusher = WeightPusher(
            endpoint, carrier, plan, device=device, deadline_s=job["deadline_s"], senders=senders, policy=case["policy"]
        )
        reports = []
        for number in range(job["warm_up"] + job["repeat"]):
            report = pusher.push(weights.stream(), f"bench@{number}", "bench")
            reports.append(asdict(report))
        pusher.close()
        del weights
        figures.append(case | {"reports": reports})
    if rank == 0:
        buckets = [len(sender.buckets) for sender in plan.senders]
        Path(job["answer"]).write_text(json.dumps({"cases": figures, "buckets": buckets}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
