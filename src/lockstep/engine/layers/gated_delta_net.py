"""GatedDeltaNet layer (Qwen3-Next, Qwen3.5) on Megatron's parallel layers: heads split over TP,
rows of packed trees.

The causal convolution looks along each token's own sequence. Its taps are gathered through
`previous`, which crosses from a node into its parent. So branches share history without any state
to hand over. The recurrent state is handed down by `delta_rule.over_tree`.

Shapes: S tokens of the row, C channels of this rank (`[q | k | v]` heads), H value heads, G key
heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.engine.layers.compiled_ops import wide
from lockstep.engine.layers.delta_rule import over_tree, rule_for
from lockstep.engine.layers.linear import RowLinear
from lockstep.engine.layers.lora import LocalAdapter, Part
from lockstep.engine.layers.norm import GatedRMSNorm
from lockstep.engine.parallel.context import to_heads, to_tokens, window
from lockstep.engine.rows.packed_row import PackedRow
from lockstep.models.config import ModelConfig


class LocalLinear(nn.Module):
    """This rank's rows of a column-parallel matrix, on an input that was gathered (or copied) once
    for several of them.
    """

    def __init__(self, config: TransformerConfig, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(rows, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.adapter: nn.Module | None = None

    def make_adapter(self, parts: Sequence[Part], rank: int, scale: float) -> LocalAdapter:
        return LocalAdapter(self, parts, rank, scale)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if self.adapter is None else self.adapter(x, y)


class GatedDeltaNet(MegatronModule):
    """Stands where Megatron's SelfAttention stands.

    `model`: the sizes of the linear-attention heads.
    """

    def __init__(
        self, config: TransformerConfig, submodules: object = None, layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None, *, model: ModelConfig, **_unused: Any,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        assert pg_collection is not None
        self.group = pg_collection.tp
        parts = self.group.size()
        self.key_heads, self.value_heads = model.linear_key_heads // parts, model.linear_value_heads // parts
        self.key_dim, self.value_dim, self.taps = model.linear_key_dim, model.linear_value_dim, model.conv_kernel
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.split = [keys, keys, values]
        self.in_proj_qkv = LocalLinear(config, 2 * keys + values)
        self.in_proj_z = LocalLinear(config, values)
        self.in_proj_b = LocalLinear(config, self.value_heads)
        self.in_proj_a = LocalLinear(config, self.value_heads)
        here = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, 1, self.taps, **here))
        self.A_log = nn.Parameter(torch.empty(self.value_heads, **here))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads, **here))
        self.norm = GatedRMSNorm(config, self.value_dim, config.layernorm_epsilon)
        self.out_proj = RowLinear(
            values * parts, config.hidden_size, config=config, init_method=config.output_layer_init_method, bias=False,
            input_is_parallel=True, skip_bias_add=True, is_expert=False, tp_group=self.group,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, attention_mask: PackedRow, **_unused: Any) -> tuple[Tensor, None]:
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(hidden_states, group=self.group)
        else:
            x = copy_to_tensor_model_parallel_region(hidden_states, group=self.group)
        x_S = x[:, 0]
        beta_SH = wide(self.in_proj_b(x_S)).sigmoid()
        g_SH = -wide(self.A_log).exp() * F.softplus(wide(self.in_proj_a(x_S)) + wide(self.dt_bias))
        out_SF = self._mix(self.in_proj_qkv(x_S), g_SH, beta_SH, attention_mask)
        out_SHV, z_SHV = (y.unflatten(-1, (self.value_heads, self.value_dim)) for y in (out_SF, self.in_proj_z(x_S)))
        normed = self.norm(out_SHV, z_SHV).to(hidden_states.dtype)
        out, _ = self.out_proj(normed.flatten(1)[:, None].contiguous())
        return out, None

    def _mix(self, qkv_SC: Tensor, g_SH: Tensor, beta_SH: Tensor, row: PackedRow) -> Tensor:
        """Convolution and delta rule over the whole row, value heads x dim of this rank's tokens.
        Under context parallelism they run on this rank's share of the heads.
        """
        parts = to_heads(*qkv_SC.split(self.split, -1))
        g, beta = to_heads(g_SH, beta_SH)
        q, k, v = self.convolve(torch.cat(parts, -1), row).split([part.shape[1] for part in parts], -1)
        q, k = (normalise(y.unflatten(-1, (-1, self.key_dim))) for y in (q, k))
        repeat = self.value_heads // self.key_heads
        if repeat > 1:
            q, k = (y.repeat_interleave(repeat, 1) for y in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        out_SHV = over_tree((q, k, v, g, beta), row, rule_for(v))
        return to_tokens(out_SHV.flatten(1))

    def _taps(self) -> Tensor:
        """The convolution's weights of the heads that this rank convolves, `[C, taps]`."""
        return torch.cat([window(part) for part in self.conv_weight[:, 0].split(self.split)])

    def convolve(self, x_SC: Tensor, row: PackedRow) -> Tensor:
        """silu of the depthwise causal convolution along each token's own sequence; before its
        beginning there are zeros.
        """
        taps_KS = row.conv_taps_KS(self.taps)
        beyond = torch.cat((x_SC, x_SC.new_zeros(1, x_SC.shape[1])))
        weight_CK = wide(self._taps())
        total = wide(torch.zeros_like(x_SC))
        for back in reversed(
            range(self.taps)
        ):  # oldest first and fused, as PyTorch's conv1d adds them up: equal to the bit
            total = torch.addcmul(total, wide(beyond[taps_KS[back]]), weight_CK[:, self.taps - 1 - back])
        return F.silu(total).to(x_SC.dtype)


def normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Unit length over the last dim, `x / sqrt(sum x^2 + eps)`."""
    x32 = wide(x)
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
