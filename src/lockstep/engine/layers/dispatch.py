"""Tokens to the ranks that hold their experts, and back: all-to-all over expert parallelism, gather
over an expert's own split.

Shapes: T tokens of this rank, K experts per token, P = T*K pairs, R received rows, H hidden, D
expert-parallel ranks, E experts of one rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from lockstep.engine.parallel import groups

Apply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows, row of each pair, local expert of each pair) -> one output row per pair."""


def through_ranks(apply: Apply, x_TH: Tensor, experts_TK: Tensor) -> Tensor:
    """`[P, H]`: for every (token, chosen expert) pair in order, the expert's output for that token."""
    expert_P = experts_TK.reshape(-1)
    token_P = torch.arange(len(expert_P), device=x_TH.device) // experts_TK.shape[1]
    expert_group = groups.expert()
    split_group = groups.expert_tensor()
    if expert_group.size() == 1 and split_group.size() == 1:
        return apply(x_TH, token_P, expert_P)
    order_P = expert_P.argsort(stable=True)
    sorted_PH = x_TH[token_P[order_P]]
    out_PH = _exchanged(apply, sorted_PH, expert_P[order_P], expert_group, split_group)
    return out_PH[order_P.argsort()]


def _exchanged(
    apply: Apply, x_PH: Tensor, expert_P: Tensor, expert_group: ProcessGroup, split_group: ProcessGroup
) -> Tensor:
    """Pairs sorted by expert, sent to the expert's rank, computed, and sent back."""
    ranks, experts = expert_group.size(), apply.count  # pyright: ignore[reportFunctionMemberAccess]
    sent_DE = torch.bincount(expert_P, minlength=ranks * experts).view(ranks, experts)
    taken_DE = torch.empty_like(sent_DE)
    dist.all_to_all_single(taken_DE, sent_DE, group=expert_group)
    counts = torch.stack([sent_DE.sum(1), taken_DE.sum(1)]).tolist()  # the one moment the host waits for the device
    rows_RH = all_to_all(expert_group, x_PH, counts[1], counts[0])
    out_RH = _split_experts(apply, rows_RH, taken_DE, split_group)
    return all_to_all(expert_group, out_RH, counts[0], counts[1])


def _split_experts(apply: Apply, rows_RH: Tensor, taken_DE: Tensor, group: ProcessGroup) -> Tensor:
    """Run the experts; where their matrices are split, on the rows of all ranks of the split,
    summing the partial results.
    """
    if group.size() == 1:
        expert_R = _experts_of(taken_DE)
        return apply(rows_RH, torch.arange(len(expert_R), device=rows_RH.device), expert_R)
    ranks, experts = taken_DE.shape
    everyone = torch.empty((group.size() * ranks, experts), dtype=taken_DE.dtype, device=taken_DE.device)
    dist.all_gather_into_tensor(everyone, taken_DE.contiguous(), group=group)
    everyone = everyone.view(group.size(), ranks, experts)
    sizes = everyone.flatten(1).sum(1).tolist()
    longest = max(sizes)
    padded = F.pad(rows_RH, (0, 0, 0, longest - len(rows_RH)))  # gloo gathers equal parts only
    # Each rank's gradient of the gathered rows is a part of the sum (its own columns of the
    # experts): gathered parts are added up.
    gathered = gather_from_sequence_parallel_region(padded, group=group)
    real_R = torch.cat([torch.arange(size, device=padded.device) + rank * longest for rank, size in enumerate(sizes)])
    expert_R = torch.cat([_experts_of(counts_DE) for counts_DE in everyone])
    partial = apply(gathered, real_R, expert_R)
    spread = torch.zeros_like(gathered).index_copy(0, real_R, partial)
    return reduce_scatter_to_sequence_parallel_region(spread, group=group)[: len(rows_RH)]


def _experts_of(taken_DE: Tensor) -> Tensor:
    """Local expert of each received row: rows come by sending rank, and by expert within it."""
    ranks, experts = taken_DE.shape
    numbers = torch.arange(experts, device=taken_DE.device).repeat(ranks)
    return numbers.repeat_interleave(taken_DE.flatten())
