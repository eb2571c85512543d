"""RMS norm for every use in a Qwen model: the stream, query and key heads, the gated output of a
linear-attention head.

Shapes: ... any leading dims, H normalised dim.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.engine.layers.compiled_ops import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """`x / rms(x) * w`, or `* (1 + w)` in families whose norms are stored zero-centred. Computed in
    fp32, rounded once.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.eps, self.zero_centered)


class GatedRMSNorm(nn.Module):
    """`rms_norm(x) * w * silu(gate)`, per head (Qwen3-Next's gated norm; never zero-centred)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, self.weight, gate, self.eps)
