"""Small values between ranks, as JSON bytes in tensors (never pickled)."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lockstep.engine.parallel.device import device


def broadcast_json(value: dict[str, Any], source: int, group: ProcessGroup) -> dict[str, Any]:
    """`value` of the global rank `source`, on every rank of the group."""
    if group.size() == 1:
        return value
    sends = dist.get_rank() == source
    data = torch.frombuffer(bytearray(json.dumps(value).encode() if sends else b" "), dtype=torch.uint8).to(device())
    size = torch.tensor([len(data)], device=device())
    dist.broadcast(size, source, group=group)
    if not sends:
        data = torch.empty(int(size), dtype=torch.uint8, device=device())
    dist.broadcast(data, source, group=group)
    return json.loads(bytes(data.cpu().tolist()))


def everyones_json(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The values of all ranks, in rank order, on every rank."""
    world = dist.GroupMember.WORLD
    assert world is not None
    return [broadcast_json(value, rank, world) for rank in range(world.size())]
