"""Log-probability and entropy of chosen tokens from hidden states, vocabulary-parallel, a chunk of
tokens at a time.

The full logits never exist. Forward keeps one number per token (the log of the softmax's
denominator); backward computes each chunk's logits again. Everything after the matrix product is
fp32 (fp64 for fp64 models).

With z = h W^T / T and p = softmax(z): logprob = z_t - lse(z) and entropy = lse(z) - sum p z.
Gradients: d logprob / dz = onehot(t) - p, d entropy / dz = -p (log p + entropy).

Shapes: N tokens, H hidden, V vocabulary rows of this rank (the last rank's padding rows are left
out).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_BYTES = 256 * 1024 * 1024
"""Largest block of logits held at once."""


def _chunk(vocabulary: int, element: int) -> int:
    return max(1, CHUNK_BYTES // (vocabulary * element))


def _logits(hidden_NH: Tensor, weight_VH: Tensor, temperature_N: Tensor) -> Tensor:
    """`[N, V]` in fp32 or wider; on CUDA the product itself accumulates into fp32, without a
    rounding to bf16 between.
    """
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    if hidden_NH.is_cuda and hidden_NH.dtype != wide:
        logits = torch.mm(hidden_NH, weight_VH.mT, out_dtype=wide)
    else:
        logits = (hidden_NH @ weight_VH.mT).to(wide)
    return logits.div_(temperature_N[:, None])


class _LinearLogprob(torch.autograd.Function):
    """Backward returns this rank's part of the hidden states' gradient; the caller's region sums
    the parts over TP.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: Tensor, start: int, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, denominators = [], [], []
        step = _chunk(weight.shape[0], torch.promote_types(hidden.dtype, torch.float32).itemsize)
        for first in range(0, hidden.shape[0], step):
            piece = slice(first, first + step)
            z_NV = _logits(hidden[piece], weight, temperature[piece])
            top_N = z_NV.amax(1)
            if group.size() > 1:
                dist.all_reduce(top_N, dist.ReduceOp.MAX, group=group)
            local_N = target[piece] - start
            own_N = (local_N >= 0) & (local_N < weight.shape[0])
            chosen_N = z_NV.gather(1, local_N.clamp(0, weight.shape[0] - 1)[:, None])[:, 0]
            e_NV = (z_NV - top_N[:, None]).exp_()
            sums_3N = torch.stack([e_NV.sum(1), (e_NV * z_NV).sum(1), torch.where(own_N, chosen_N, 0.0)])
            if group.size() > 1:
                dist.all_reduce(sums_3N, group=group)
            lse_N = sums_3N[0].log() + top_N
            denominators.append(lse_N)
            logprobs.append(sums_3N[2] - lse_N)
            entropies.append(lse_N - sums_3N[1] / sums_3N[0])
        logprob_N, entropy_N, lse_N = torch.cat(logprobs), torch.cat(entropies), torch.cat(denominators)
        ctx.save_for_backward(hidden, weight, target, temperature, lse_N, entropy_N)
        ctx.start, ctx.step = start, step
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logprob_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden, weight, target, temperature, lse_N, entropy_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=lse_N.dtype, device=weight.device)
        for first in range(0, hidden.shape[0], ctx.step):
            piece = slice(first, first + ctx.step)
            log_p_NV = _logits(hidden[piece], weight, temperature[piece]).sub_(lse_N[piece, None])
            local_N = target[piece] - ctx.start
            own_N = (local_N >= 0) & (local_N < weight.shape[0])
            slope_NV = log_p_NV + entropy_N[piece, None]
            slope_NV.mul_(grad_entropy_N[piece, None]).add_(grad_logprob_N[piece, None]).mul_(log_p_NV.exp_()).neg_()
            onehot = torch.where(own_N, grad_logprob_N[piece], 0.0)
            slope_NV.scatter_add_(1, local_N.clamp(0, weight.shape[0] - 1)[:, None], onehot[:, None])
            slope_NV.div_(temperature[piece, None])
            narrow = slope_NV.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[piece] = narrow @ weight
            if grad_weight is not None:
                grad_weight += narrow.mT @ hidden[piece]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def linear_logprob(
    hidden_S1H: Tensor,
    weight_VH: Tensor,
    predictor_N: Tensor,
    target_N: Tensor,
    temperature_N: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor]:
    """(logprob_N, entropy_N) of `target_N`, predicted from the hidden states at `predictor_N`.

    hidden_S1H: the last stage's output, split along S under sequence parallelism.
    weight_VH: this TP rank's rows.
    vocab_size: the true one; rows beyond it are padding and take no part.
    group: the TP group. Gradients flow to hidden_S1H and, if it asks, weight_VH.
    """
    hidden_SH = hidden_S1H[:, 0]
    if sequence_parallel:
        hidden_SH = gather_from_sequence_parallel_region(hidden_SH, group=group)
    else:
        hidden_SH = copy_to_tensor_model_parallel_region(hidden_SH, group=group)
    start = group.rank() * weight_VH.shape[0]
    rows = max(0, min(weight_VH.shape[0], vocab_size - start))
    wide = torch.promote_types(hidden_SH.dtype, torch.float32)
    temperature_N = temperature_N.to(wide)
    if not len(predictor_N):
        empty = hidden_SH.sum().to(wide) * 0 + weight_VH[:0].sum() * 0
        return empty.expand(0), empty.expand(0)
    return _LinearLogprob.apply(  # pyright: ignore[reportReturnType]
        hidden_SH[predictor_N], weight_VH[:rows], target_N, temperature_N, start, group
    )


@torch.no_grad()
def most_likely(
    hidden_S1H: Tensor,
    weight_VH: Tensor,
    predictor_N: Tensor,
    count: int,
    vocab_size: int,
    group: ProcessGroup,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities at temperature 1), each `[N, count]`, of the most likely tokens after
    the hidden states at `predictor_N`, most likely first, on every TP rank.

    Arguments as for `linear_logprob`; logits exist a chunk at a time here, too. No temperature
    changes the order. Beyond the vocabulary the id is -1.
    """
    hidden_SH = hidden_S1H[:, 0]
    if sequence_parallel:
        hidden_SH = gather_from_sequence_parallel_region(hidden_SH, group=group)
    start = group.rank() * weight_VH.shape[0]
    rows = max(0, min(weight_VH.shape[0], vocab_size - start))
    wide = torch.promote_types(hidden_SH.dtype, torch.float32)
    step = _chunk(max(1, rows), wide.itemsize)
    chunks = [(predictor_N.new_empty((0, count)), torch.empty(0, count, dtype=wide, device=predictor_N.device))]
    for part_N in predictor_N.split(step) if len(predictor_N) else ():
        z_NV = _logits(hidden_SH[part_N], weight_VH[:rows], torch.ones(len(part_N), dtype=wide, device=part_N.device))
        (best, ids), total_N1 = best_of_shard(z_NV, start, count), z_NV.logsumexp(1, keepdim=True)
        if group.size() > 1:
            best, ids, total_N1 = (_gathered(part, group) for part in (best, ids, total_N1))
        best, ids = best_of_all(best, ids, count)
        chunks.append((ids, best - total_N1.logsumexp(1, keepdim=True)))
    ids, logprobs = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return ids, logprobs


def best_of_shard(z_NV: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """(logits, ids), each `[N, count]`, of the best tokens of a shard whose first id is `start`.

    A shard with fewer than `count` of them fills up with impossible ones: id -1.
    """
    have = min(count, z_NV.shape[1])
    best_NC, at_NC = z_NV.topk(have, dim=1)
    values = z_NV.new_full((len(z_NV), count), float("-inf"))
    ids = torch.full(values.shape, -1, dtype=torch.int64, device=z_NV.device)
    values[:, :have], ids[:, :have] = best_NC, at_NC + start
    return values, ids


def best_of_all(best: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(logits, ids), each `[N, count]`, best first, from the shards' results side by side. The best
    of all is the best of its own shard.
    """
    values, columns = best.topk(count, dim=1)
    return values, ids.gather(1, columns)


def _gathered(part: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' columns side by side, in rank order."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, 1)
