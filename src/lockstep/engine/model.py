"""The model a rank holds: Megatron's GPTModel and TransformerLayer with forward passes of our own.

Rotary angles come from each token's own position, since rows hold many sequences. The model returns
hidden states; logits exist only in chunks, inside `lm_head.py`. Sequence-first layout as in
Megatron: `[S, 1, H]`, S split over context-parallel ranks, and over TP under sequence parallelism.

Shapes: S tokens, H hidden, D rotary dims.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lockstep.engine.layers.moe import MoE
from lockstep.engine.parallel.context import share
from lockstep.engine.parallel.device import device
from lockstep.engine.parallel.progress import progress
from lockstep.engine.rows.packed_row import PackedRow
from lockstep.engine.rows.routed_experts import Replayed, recompute_pass
from lockstep.models.config import Rope


def inverse_frequencies(rope: Rope) -> Tensor:
    """fp32 `[D/2]` on CPU. kind "llama3" stretches the low frequencies (Llama 3.1's rule, as in
    transformers' `rope_utils`).
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim)
    if rope.kind != "llama3":
        return inverse
    wavelength = 2 * math.pi / inverse
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * inverse / rope.factor + blend * inverse
    scaled = torch.where(wavelength > longest, inverse / rope.factor, inverse)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), between, scaled)


def _passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first and the second computation of a layer."""
    return nullcontext(), recompute_pass()


class Layer(TransformerLayer):
    """Pre-norm residual layer: `x + mixer(norm(x))`, then `x + mlp(norm(x))`, recomputed in the
    backward pass when asked.
    """

    recompute = False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, attention_mask: PackedRow, rotary_pos_emb: tuple[Tensor, Tensor], **_unused: Any
    ) -> tuple[Tensor, None]:
        if self.recompute and torch.is_grad_enabled():
            inputs = (hidden_states, attention_mask, rotary_pos_emb)
            out = checkpoint(self._run, *inputs, use_reentrant=False, context_fn=_passes)
        else:
            out = self._run(hidden_states, attention_mask, rotary_pos_emb)
        if out.requires_grad:
            out.register_hook(progress.tick)
        return out, None

    def _run(self, x_S1H: Tensor, row: PackedRow, angles: tuple[Tensor, Tensor]) -> Tensor:
        mixed, _ = self.self_attention(self.input_layernorm(x_S1H), attention_mask=row, rotary_pos_emb=angles)
        x_S1H = x_S1H + mixed
        normed = self.pre_mlp_layernorm(x_S1H)
        out, _ = self.mlp(normed, row) if isinstance(self.mlp, MoE) else self.mlp(normed)
        progress.tick()
        return x_S1H + out


class Model(GPTModel):
    """One pipeline stage. `forward_row` is the only entry; the first stage embeds, the last applies
    the final norm.
    """

    def __init__(self, *args: Any, rope: Rope, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        # Not a buffer: casting the model to bf16 would round the angles.
        self._inverse_D = inverse_frequencies(rope)
        self.replayed = Replayed(device())

    def angles(self, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), fp32 `[S, 1, D]`."""
        half = positions_S.float()[:, None] * self._inverse_D.to(positions_S.device)
        angle_S1D = torch.cat((half, half), -1)[:, None]
        return angle_S1D.cos(), angle_S1D.sin()

    def forward_row(self, row: PackedRow, received: Tensor | None = None) -> Tensor:
        """Hidden states after this stage.

        `received`: the previous stage's output, on every stage but the first.
        """
        if self.pre_process:
            tokens_S = share(row.tokens_S)
            hidden = self.embedding(input_ids=tokens_S[None], position_ids=share(row.positions_S)[None])
        else:
            hidden = None
            self.decoder.set_input_tensor(received)  # pyright: ignore[reportArgumentType]
        angles = self.angles(share(row.positions_S))
        out = self.decoder(hidden_states=hidden, attention_mask=row, rotary_pos_emb=angles)  # pyright: ignore
        self.replayed.add(row.replays)
        row.replays.clear()
        return out

    def head_weight(self) -> Tensor:
        """Vocabulary-parallel rows of the output layer (the embedding when tied and on this stage)."""
        return (
            self.shared_embedding_or_output_weight() if self.output_layer.weight is None else self.output_layer.weight
        )
