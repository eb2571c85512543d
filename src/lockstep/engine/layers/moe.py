"""Mixture of experts: routed experts as stacked matrices on grouped products, spread over
expert-parallel ranks, plus a shared expert.

Every rank brings its own tokens, a shard of the sequence. Without sequence parallelism the layer
splits and joins the sequence itself, so there is one way of working. Tokens go to the ranks that
hold their experts and come back (`dispatch.py`).

Shapes: T tokens of this rank, K experts per token, P = T*K pairs, E experts of this rank, H hidden,
F expert width of this rank, G rows of the grouped products (pairs and alignment).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.engine.layers.compiled_ops import gated_silu, wide
from lockstep.engine.layers.dispatch import through_ranks
from lockstep.engine.layers.mlp import GatedMLP
from lockstep.engine.layers.router import Router
from lockstep.engine.parallel import groups
from lockstep.engine.parallel.context import share
from lockstep.engine.rows.packed_row import PackedRow
from lockstep.engine.rows.routed_experts import Replay

ALIGN = 8
"""Rows of one expert are filled up to a multiple of this: grouped kernels want groups that start at
16-byte boundaries.
"""


def grouped(x_GI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """`[G, O]`: rows up to `offsets[0]` times expert 0's matrix transposed, and so on.
    `offsets[-1]` is G.

    PyTorch's grouped_mm where it has the type: bf16 anywhere, fp32 on CPU. Other types run expert
    by expert, the reference.
    """
    if x_GI.dtype == torch.bfloat16 or (x_GI.dtype == torch.float32 and not x_GI.is_cuda):
        return F.grouped_mm(x_GI, weight_EOI.transpose(1, 2), offs=offsets_E)
    return grouped_reference(x_GI, weight_EOI, offsets_E)


def grouped_reference(x_GI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """`grouped` as a plain loop."""
    counts = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, weight_EOI[expert]) for expert, rows in enumerate(x_GI.split(counts))])


class Experts(MegatronModule):
    """This rank's routed experts: `w1` `[E, 2F, H]` (gate rows, then up rows) and `w2` `[E, H, F]`,
    with optional adapters.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        assert config.num_moe_experts is not None
        assert config.moe_ffn_hidden_size is not None
        self.count = config.num_moe_experts // groups.expert().size()
        width = config.moe_ffn_hidden_size // groups.expert_tensor().size()
        here = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.w1 = nn.Parameter(torch.empty(self.count, 2 * width, config.hidden_size, **here))
        self.w2 = nn.Parameter(torch.empty(self.count, config.hidden_size, width, **here))
        self.w1_adapter: nn.Module | None = None
        self.w2_adapter: nn.Module | None = None

    def _product(self, x_GI: Tensor, weight: Tensor, adapter: Any, offsets_E: Tensor) -> Tensor:
        y_GO = grouped(x_GI, weight, offsets_E)
        if adapter is None:
            return y_GO
        a, b = adapter.stacked()
        return torch.add(y_GO, grouped(grouped(x_GI, a, offsets_E), b, offsets_E), alpha=adapter.scale)

    def forward(self, x_TH: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        """`[P, H]`: expert `expert_P` (numbered on this rank) applied to row `token_P` of `x_TH`,
        pair by pair.
        """
        slot_P, source_G, offsets_E = layout(token_P, expert_P, self.count, len(x_TH))
        rows_GH = torch.cat((x_TH, x_TH.new_zeros(1, x_TH.shape[1])))[source_G]
        active = gated_silu(self._product(rows_GH, self.w1, self.w1_adapter, offsets_E))
        return self._product(active, self.w2, self.w2_adapter, offsets_E)[slot_P]


def layout(token_P: Tensor, expert_P: Tensor, experts: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row layout for the grouped matmuls, computed without a device-to-host sync.

    Returns slot_P (row of each pair), source_G (token of each row, `tokens` for filling rows) and
    offsets_E (int32, end of each expert's rows). The last expert takes the unused rows at the end,
    so that every row is computed from something.
    """
    pairs, here = len(token_P), token_P.device
    rows = -(-pairs // ALIGN) * ALIGN + ALIGN * experts
    counts_E = torch.bincount(expert_P, minlength=experts)
    padded_E = (counts_E + ALIGN - 1) // ALIGN * ALIGN
    ends_E = padded_E.cumsum(0)
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
    order_P = expert_P.argsort(stable=True)
    place_P = torch.arange(pairs, device=here) + shift_E[expert_P[order_P]]
    slot_P = torch.empty_like(place_P).scatter_(0, order_P, place_P)
    source_G = torch.full((rows,), tokens, device=here).scatter_(0, place_P, token_P[order_P])
    offsets_E = ends_E.to(torch.int32)
    offsets_E[-1] = rows
    return slot_P, source_G, offsets_E


class SharedExpert(GatedMLP):
    """An ordinary MLP on all tokens, weighted by a sigmoid gate of its own. Like the routed experts
    it works on sequence shards.
    """

    def __init__(self, config: TransformerConfig) -> None:
        own = copy.copy(config)
        assert config.moe_shared_expert_intermediate_size is not None
        own.ffn_hidden_size = config.moe_shared_expert_intermediate_size
        own.sequence_parallel = config.tensor_model_parallel_size > 1
        super().__init__(own)
        self.gate_weight = nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, x_T1H: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, _ = super().forward(x_T1H)
        return (wide(out) * F.linear(wide(x_T1H), wide(self.gate_weight)).sigmoid()).to(out.dtype), None


class MoE(MegatronModule):
    """The MLP of a mixture-of-experts layer. `number` counts such layers over the whole model (set
    by `build`).
    """

    number = 0

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.group = groups.tensor()
        self.split = self.group.size() > 1 and not config.sequence_parallel
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config) if config.moe_shared_expert_intermediate_size else None

    def forward(self, x_S1H: Tensor, row: PackedRow) -> tuple[Tensor, None]:
        x = scatter_to_sequence_parallel_region(x_S1H, group=self.group) if self.split else x_S1H
        weights_TK, experts_TK = self._route(x[:, 0], row)
        routed_PH = through_ranks(self.experts, x[:, 0], experts_TK)
        mixed_TH = (wide(routed_PH.unflatten(0, experts_TK.shape)) * weights_TK[..., None]).sum(1)
        out = mixed_TH.to(x.dtype)[:, None]
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)[0]
        if self.split:
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.group)
        return out, None

    def _route(self, x_TH: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
        """(weights, experts) of this rank's share of the row; what was replayed is noted with the
        row.
        """
        if row.experts_SLK is None:
            return self.router(x_TH, None)[:2]
        first = self.group.rank() * len(x_TH) if self.group.size() > 1 else 0
        here = slice(first, first + len(x_TH))
        weights_TK, experts_TK, own_TK = self.router(x_TH, share(row.experts_SLK[:, self.number])[here].long())
        if own_TK is not None:
            counted_T, keys_T = share(row.followed_S())[here], share(row.record_keys_S())[here]
            row.replays.append(Replay(self.number, experts_TK, own_TK, counted_T, keys_T))
        return weights_TK, experts_TK
