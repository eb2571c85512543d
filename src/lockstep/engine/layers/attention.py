"""Self-attention over a row of packed trees: Megatron's SelfAttention with a forward pass of our
own and one mask rule (`tree.PackedRow`).

The mask rides in Megatron's `attention_mask` argument as the Row itself. Three renderings compute
the same. "dense": softmax written out, the reference. "sdpa": PyTorch's
scaled_dot_product_attention with the dense mask, on a CPU. "flex": compiled FlexAttention with the
block mask, on a GPU (no backward pass on a CPU).

Shapes: S row length, G query groups of this rank, Q query heads per group, N = G*Q heads, D head
dim, H hidden.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from lockstep.engine.layers.compiled_ops import rotate, sigmoid_gate, wide
from lockstep.engine.parallel.context import repeats, to_heads, to_tokens
from lockstep.engine.parallel.device import CUDA
from lockstep.engine.rows.packed_row import BLOCK, PackedRow
from lockstep.errors import DataError

Rendering = Literal["dense", "sdpa", "flex"]
DEFAULT: Rendering = "flex" if CUDA else "sdpa"


@cache
def _compiled_flex() -> object:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float) -> Tensor:
    """FlexAttention of `[1, heads, S, D]`, compiled once for all row lengths: heads and D are
    constants of the kernels.

    Rows are multiples of its blocks, which torch can't see in a symbolic length. Declared so, the
    kernels leave out bounds checks that cost a third of the backward pass.
    """
    if row.length % BLOCK:
        raise DataError(f"a row of {row.length} tokens is no multiple of FlexAttention's {BLOCK}")
    for x in (q, k, v):
        for dim in (0, 1, 3):
            torch._dynamo.mark_static(x, dim)
    options = {"IS_DIVISIBLE": True}
    grouped = q.shape[1] != k.shape[1]
    return _compiled_flex()(  # pyright: ignore
        q, k, v, block_mask=row.block_mask(), scale=scale, enable_gqa=grouped, kernel_options=options
    )


def attend(q_SND: Tensor, k_SGD: Tensor, v_SGD: Tensor, row: PackedRow, scale: float, rendering: Rendering) -> Tensor:
    """softmax(q k^T * scale over what the row's rule lets each query see) v, `[S, N, D]`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SND, k_SGD, v_SGD))
    grouped = q.shape[1] != k.shape[1]
    if rendering == "flex":
        out = flex(q, k, v, row, scale)
    elif rendering == "sdpa":
        mask_SS = row.dense_mask_SS()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS, scale=scale, enable_gqa=grouped)
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = wide(q @ k.mT * scale).masked_fill(~row.dense_mask_SS(), float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
    return out[0].transpose(0, 1)


class CoreAttention(nn.Module):
    """The part Megatron's constructor builds for us; it only knows its rendering."""

    def __init__(self, config: object, **_unused: object) -> None:
        super().__init__()
        self.rendering: Rendering = DEFAULT

    def forward(self, q_SND: Tensor, k_SGD: Tensor, v_SGD: Tensor, row: PackedRow) -> Tensor:
        return attend(q_SND, k_SGD, v_SGD, row, q_SND.shape[-1] ** -0.5, self.rendering)


class TreeAttention(SelfAttention):
    """Attention of all families: grouped queries, optional norms of query and key heads, optional
    output gate (Qwen3.5).
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, attention_mask: PackedRow, rotary_pos_emb: tuple[Tensor, Tensor], **_unused: object
    ) -> tuple[Tensor, None]:
        q, gate, k, v = self._heads(hidden_states)
        length, heads, dim = q.shape
        if self.q_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)  # pyright: ignore[reportOptionalCall]
        q, k = rotate(q, *rotary_pos_emb), rotate(k, *rotary_pos_emb)
        out_SND = self._attend(q, k, v, attention_mask)
        if gate is not None:
            out_SND = sigmoid_gate(out_SND, gate)
        out_S1H, _ = self.linear_proj(out_SND.reshape(length, 1, heads * dim))  # pyright: ignore[reportCallIssue]
        return out_S1H, None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, row: PackedRow) -> Tensor:
        """Attention over the whole row; under context parallelism on this rank's share of the
        heads, then back to its own tokens.
        """
        dim, times = q.shape[2], repeats(k.shape[1])
        if times > 1:
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        full = (x_SF.unflatten(1, (-1, dim)) for x_SF in to_heads(q.flatten(1), k.flatten(1), v.flatten(1)))
        out_SND = self.core_attention(*full, row)  # pyright: ignore[reportCallIssue]
        return to_tokens(out_SND.flatten(1)).unflatten(1, (-1, dim))

    def _heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """This rank's query heads, their gates (None without an output gate), key and value heads,
        `[S, heads, D]`.

        With more TP ranks than key heads, every rank computes a window of the fused rows and
        gathers all of them. It keeps its own query heads and the key head they share. The gather's
        backward pass adds up the contributions of the ranks that share the key head.
        """
        fused_S1F, _ = self.linear_qkv(hidden_states)  # pyright: ignore[reportCallIssue]
        ranks, groups = self.world_size, self.config.num_query_groups
        heads, dim = self.config.num_attention_heads, self.hidden_size_per_attention_head
        assert groups is not None
        per_group, gates = heads // groups, heads // groups if self.config.attention_output_gate else 0
        shared = groups < ranks
        if shared:
            fused_S1F = all_gather_last_dim_from_tensor_parallel_region(fused_S1F, group=self.tp_group)
        length = fused_S1F.shape[0]
        q, gate, k, v = fused_S1F.view(length, -1, per_group + gates + 2, dim).split([per_group, gates, 1, 1], 2)
        if shared:
            first = self.tp_group.rank() * heads // ranks
            group, start, count = first // per_group, first % per_group, heads // ranks
            window = slice(start, start + count)
            q, gate, k, v = q[:, group, window], gate[:, group, window], k[:, group], v[:, group]
        q, k, v = (x.reshape(length, -1, dim) for x in (q, k, v))
        return q, gate.reshape(length, -1, dim) if gates else None, k, v
