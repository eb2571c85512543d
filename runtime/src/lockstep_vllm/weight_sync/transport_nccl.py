"""The receiving side of `lockstep.weight_sync.transport_nccl`: broadcasts through a NCCL communicator of one sender and all workers."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from lockstep_vllm.weight_sync.cuda_wait import passed
from lockstep_vllm.weight_sync.rendezvous import join

_WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_NEVER = timedelta(days=30)
"""torch's own deadline: past it the process's watchdogs write dumps and may end it. Ours is kept here, by `abort`."""


class NcclTransport:
    """Rank `rank` of the sender's communicator."""

    def __init__(self, info: dict[str, Any], rank: int, device: torch.device) -> None:
        """Raises ValueError when the two sides' NCCL differ, RuntimeError at the deadline."""
        self.deadline_s = float(info["deadline_s"])
        check_version(info["nccl"])
        self._group: Any = _group(info, rank)
        # The communicator is made by its first use; the sender makes the same.
        self.receive(torch.zeros(1, dtype=torch.uint8, device=device))()
        joined = torch.cuda.Event()
        joined.record()
        if not passed(joined, self.deadline_s):
            self.close()
            raise RuntimeError(f"no communicator within {self.deadline_s:g} s")

    def receive(self, bytes_N: torch.Tensor) -> Callable[[], None]:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.asyncOp = True
        work = self._group.broadcast([bytes_N], options)

        def wait() -> None:
            work.wait()  # of the current stream, not of the host

        return wait

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def check_version(sender: list[int]) -> None:
    """Raises ValueError: releases of NCCL don't promise to speak to each other."""
    here = list(nccl.version())
    if here != sender:
        raise ValueError(
            f"the trainer has NCCL {'.'.join(map(str, sender))} and the server {'.'.join(map(str, here))}: "
            "install the same torch release in both environments"
        )


def _group(info: dict[str, Any], rank: int) -> Any:
    """A communicator of its own. torch's watchdog would end the process at a timeout; the receiver aborts instead and says why."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _NEVER
    # Else filling or landing one bucket would take all processors of the GPU before the next broadcast gets any.
    options.is_high_priority_stream = True
    before = os.environ.get(_WATCHDOG)
    os.environ[_WATCHDOG] = "0"
    try:
        return dist.ProcessGroupNCCL(dist.PrefixStore("weights", join(info)), rank, info["world_size"], options)
    finally:
        if before is None:
            del os.environ[_WATCHDOG]
        else:
            os.environ[_WATCHDOG] = before
