"""The gated MLP of dense layers and shared experts: Megatron's MLP with our linears and activation.

Shapes: S sequence (of this rank under sequence parallelism), H hidden.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lockstep.engine.layers.compiled_ops import gated_silu
from lockstep.engine.layers.linear import ColumnLinear, RowLinear
from lockstep.engine.parallel import groups


class GatedMLP(MLP):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, `[gate | up]` rows on each rank."""

    def __init__(self, config: TransformerConfig) -> None:
        submodules = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tensor())

    def forward(self, x_S1H: Tensor, *_unused: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate_up, _ = self.linear_fc1(x_S1H)
        out, _ = self.linear_fc2(gated_silu(gate_up))
        return out, None
