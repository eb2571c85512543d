"""Merge an adapter into a copy of its weight: weight + scale * B A. The sum is in fp32 and rounded
once, to the weight's dtype.

Shapes: E experts, O output rows, I input columns, R LoRA rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TILE = {"ROWS": 64, "COLUMNS": 128}
"""Of the weight, for one program of the kernel."""


def merge(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
    """A tensor of the weight's dtype, of its own; stacks `[E, O, I]`, `[E, O, R]`, `[E, R, I]` as
    well.

    On a GPU one pass reads the weight and writes the result. torch's way moves five times the bytes
    and was slower than the link.
    """
    if weight_OI.is_cuda:
        return fused_merge(weight_OI, b_OR, a_RI, scale)
    product = torch.baddbmm if weight_OI.dim() == 3 else torch.addmm
    return product(weight_OI.float(), b_OR.float(), a_RI.float(), alpha=scale).to(weight_OI.dtype)


def fused_merge(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
    """`merge` by a Triton kernel."""
    from lockstep.engine.export.merge_kernel import merge_kernel

    kernel: Any = merge_kernel  # Triton has no stubs for it
    weight_EOI, b_EOR, a_ERI = (t.contiguous().view(-1, *t.shape[-2:]) for t in (weight_OI, b_OR, a_RI))
    experts, rows, columns = weight_EOI.shape
    rank = a_ERI.shape[1]
    merged_EOI = torch.empty_like(weight_EOI)
    grid = (-(-rows // _TILE["ROWS"]), -(-columns // _TILE["COLUMNS"]), experts)
    kernel[grid](weight_EOI, b_EOR, a_ERI, merged_EOI, scale, rows, columns, rank, **_TILE, RANKS=16)
    return merged_EOI.view(weight_OI.shape)
