"""Context parallelism: the tokens of a row are distributed over ranks round-robin, token i to rank
i mod C.

Layers that work token by token (embedding, norms, projections, experts, loss head) see this rank's
tokens only. Attention and GatedDeltaNet need the full row. One all-to-all trades this rank's tokens
with all heads for all tokens with this rank's share of the heads. A second one trades them back
(Ulysses, arXiv 2309.14509). So masks, convolution and recurrent states see full rows in row order,
as without context parallelism.

Each rank has the same work, whatever the prefix tree looks like. Neighbouring tokens alternate
between ranks, so scored tokens and padding spread evenly. The number of ranks must divide the
number of heads. Verified on CPUs (gloo) in fp32 and on two GPUs in bf16.

The loss of a row is one number made from all its log-probabilities. Every rank computes the loss
from all of them and differentiates it by its own. So a weight's gradient is the sum over the ranks,
as over data-parallel ones.

Shapes: S tokens of the row, C context ranks, T = S/C tokens of this rank, F features (heads x dim),
N scored tokens of the row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from lockstep.engine.parallel import groups


def share(x_S: Tensor) -> Tensor:
    """This rank's tokens `[T, ...]` of something that is known for the whole row `[S, ...]`."""
    group = groups.context()
    return x_S[group.rank() :: group.size()]


def repeats(key_heads: int) -> int:
    """The repetitions of each key and value head that give the context ranks equal windows of them."""
    ranks = groups.context().size()
    return ranks // math.gcd(key_heads, ranks)


def window(channels: Tensor) -> Tensor:
    """This rank's share of something that is laid out by heads along its first dim, as `to_heads`
    deals them.
    """
    group = groups.context()
    return channels.chunk(group.size())[group.rank()]


def to_heads(*parts_TF: Tensor) -> tuple[Tensor, ...]:
    """This rank's tokens, all heads `[T, F]` -> all tokens, this rank's heads `[S, F/C]`, in row
    order. One exchange for all parts.

    The parts have one dtype; each is laid out by heads that C divides.
    """
    group = groups.context()
    ranks = group.size()
    if ranks == 1:
        return parts_TF
    windows_TCF = torch.cat([part.unflatten(1, (ranks, -1)) for part in parts_TF], 2)
    taken_CTF = all_to_all(group, windows_TCF.transpose(0, 1).contiguous())
    whole_SF = taken_CTF.transpose(0, 1).flatten(0, 1)
    return whole_SF.split([part.shape[1] // ranks for part in parts_TF], 1)


def to_tokens(part_SF: Tensor) -> Tensor:
    """The way back: all tokens, this rank's heads `[S, F]` -> this rank's tokens, all heads `[T,
    C*F]`.
    """
    group = groups.context()
    if group.size() == 1:
        return part_SF
    owners_CTF = part_SF.unflatten(0, (-1, group.size())).transpose(0, 1).contiguous()
    return all_to_all(group, owners_CTF).transpose(0, 1).flatten(1)


def owned(predictor_N: np.ndarray) -> np.ndarray:
    """The scored tokens that a hidden state of this rank predicts. Its index here is `predictor //
    C`.
    """
    group = groups.context()
    return np.flatnonzero(predictor_N % group.size() == group.rank())


class _Collect(torch.autograd.Function):
    """Forward puts the ranks' parts together; backward hands each rank the gradient of its own
    part: all ranks have the same loss.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, index: Tensor, count: int, group: ProcessGroup) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(index)
        full = part.new_zeros((count, *part.shape[1:]))
        full[index] = part
        dist.all_reduce(full, group=group)
        return full

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        return grad_N[ctx.saved_tensors[0]], None, None, None


def collect(part: Tensor, index: np.ndarray, count: int) -> Tensor:
    """`[N, ...]` on every rank from each rank's values at its own `index` (from `owned`). The loss
    of it must be the same on all ranks.
    """
    group = groups.context()
    if group.size() == 1:
        return part
    return _Collect.apply(part, torch.from_numpy(index).to(part.device), count, group)  # pyright: ignore
