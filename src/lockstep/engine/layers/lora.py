"""Low-rank adapters on the parallel linears: `y = W x + alpha/r * B A x`, with one A and B for each
Hugging Face module.

A fused Megatron weight (query, key, value; gate, up) carries one adapter per Hugging Face module.
They are applied together: the As stacked, and the Bs as one block-diagonal matrix in the weight's
own row order. The extra work is two thin matrix products, however many modules were fused.

Source: LoRA, arXiv 2106.09685; initial values as in Hugging Face PEFT (A Kaiming-uniform, B zero).
Shapes: S sequence, I input features, O output rows of this rank, T targets, R rank, E experts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Part:
    """One Hugging Face module inside a Megatron weight: its target name and the weight's rows (of
    this rank) that belong to it.
    """

    target: str
    rows: tuple[int, ...]


def _parameters(
    parts: Sequence[Part], rank: int, features: int, weight: Tensor, experts: tuple[int, ...] = ()
) -> tuple[nn.ParameterDict, nn.ParameterDict]:
    """As and Bs by target, zeros, in the order of the parts (a ParameterDict made from a dict would
    sort them).
    """
    options = {"dtype": weight.dtype, "device": weight.device}
    lora_a, lora_b = nn.ParameterDict(), nn.ParameterDict()
    for part in parts:
        lora_a[part.target] = nn.Parameter(torch.zeros(*experts, rank, features, **options))
        lora_b[part.target] = nn.Parameter(torch.zeros(*experts, len(part.rows), rank, **options))
    return lora_a, lora_b


def row_order(parts: Sequence[Part], rows: int) -> Tensor | None:
    """The index of each row of the weight among the parts' rows laid end to end. Rows of no part
    come after them. None when in order.
    """
    order = torch.full((rows,), -1, dtype=torch.long)
    count = 0
    for part in parts:
        order[torch.tensor(part.rows, dtype=torch.long)] = torch.arange(count, count + len(part.rows))
        count += len(part.rows)
    free = order < 0
    order[free] = torch.arange(count, rows)
    return None if torch.equal(order, torch.arange(rows)) else order


class _Adapter(nn.Module):
    def __init__(self, base: nn.Module, parts: Sequence[Part], rank: int, scale: float) -> None:
        super().__init__()
        weight: Tensor = base.weight  # pyright: ignore[reportAssignmentType]
        self.rows, self.scale = weight.shape[0], scale
        self.lora_A, self.lora_B = _parameters(parts, rank, weight.shape[1], weight)
        order = row_order(parts, self.rows)
        self.order = None if order is None else order.to(weight.device)

    def stacked_a(self) -> Tensor:
        return torch.cat(list(self.lora_A.values()))

    def blocked_b(self) -> Tensor:
        """`[O, T*R]`: block-diagonal Bs, rows in the weight's order, zero rows where no target
        lies.
        """
        b = torch.block_diag(*self.lora_B.values())
        if b.shape[0] < self.rows:
            b = F.pad(b, (0, 0, 0, self.rows - b.shape[0]))
        return b if self.order is None else b[self.order]


class _ParallelAdapter(_Adapter):
    def __init__(self, base: nn.Module, parts: Sequence[Part], rank: int, scale: float) -> None:
        super().__init__(base, parts, rank, scale)
        group: ProcessGroup = base.tp_group  # pyright: ignore[reportAssignmentType]
        self.group, self.sequence = group, bool(base.sequence_parallel) and group.size() > 1


class ColumnAdapter(_ParallelAdapter):
    """A is whole on every rank, B holds this rank's rows. Under sequence parallelism A's gradient
    is partial (`gradients.RULES`).
    """

    def forward(self, x_SI: Tensor, y_SO: Tensor) -> Tensor:
        h_SR = F.linear(x_SI, self.stacked_a())
        if self.sequence:
            h_SR = gather_from_sequence_parallel_region(h_SR, group=self.group)
        else:
            h_SR = copy_to_tensor_model_parallel_region(h_SR, group=self.group)
        return torch.add(y_SO, F.linear(h_SR, self.blocked_b()), alpha=self.scale)


class RowAdapter(_ParallelAdapter):
    """A holds this rank's columns, the rank-R partial sums are reduced, B is whole on every rank."""

    def forward(self, x_SI: Tensor, y_SO: Tensor) -> Tensor:
        h_SR = F.linear(x_SI, self.stacked_a())
        if self.sequence:
            h_SR = reduce_scatter_to_sequence_parallel_region(h_SR, group=self.group)
        else:
            h_SR = reduce_from_tensor_model_parallel_region(h_SR, group=self.group)
        return torch.add(y_SO, F.linear(h_SR, self.blocked_b()), alpha=self.scale)


class LocalAdapter(_Adapter):
    """For a matrix whose input is whole on every rank already: no communication; A's gradient is
    this rank's part.
    """

    def forward(self, x_SI: Tensor, y_SO: Tensor) -> Tensor:
        return torch.add(y_SO, F.linear(F.linear(x_SI, self.stacked_a()), self.blocked_b()), alpha=self.scale)


class ExpertAdapter(nn.Module):
    """Adapters of one stacked expert weight `[E, O, I]`: A `[E, R, I]` and B `[E, O_t, R]` per
    target.

    Gives the two stacked matrices; the experts run them through the same grouped product as the
    weight itself. No communication: with experts' matrices split, the sum over ranks that finishes
    the experts' output finishes the adapter's too.
    """

    def __init__(self, weight_EOI: Tensor, parts: Sequence[Part], rank: int, scale: float) -> None:
        super().__init__()
        experts, self.rows, features = weight_EOI.shape
        self.scale = scale
        self.lora_A, self.lora_B = _parameters(parts, rank, features, weight_EOI, (experts,))
        order = row_order(parts, self.rows)
        self.order = None if order is None else order.to(weight_EOI.device)
        # grouped_mm wants rows of a multiple of 16 bytes; zero columns make odd ranks fit and
        # change nothing.
        self.pad = -(rank * len(parts)) % 8

    def stacked(self) -> tuple[Tensor, Tensor]:
        """A `[E, T*R, I]` and block-diagonal B `[E, O, T*R]`."""
        a = torch.cat(list(self.lora_A.values()), 1)
        width, blocks, left = a.shape[1], [], 0
        for b in self.lora_B.values():
            blocks.append(F.pad(b, (left, width - left - b.shape[2])))
            left += b.shape[2]
        stacked_b = torch.cat(blocks, 1)
        if stacked_b.shape[1] < self.rows:
            stacked_b = F.pad(stacked_b, (0, 0, 0, self.rows - stacked_b.shape[1]))
        if self.order is not None:
            stacked_b = stacked_b[:, self.order]
        if self.pad:
            a, stacked_b = F.pad(a, (0, 0, 0, self.pad)), F.pad(stacked_b, (0, self.pad))
        return a, stacked_b
