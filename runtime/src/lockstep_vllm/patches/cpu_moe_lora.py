"""Adapters on routed experts on a CPU. vLLM 0.32 accepts them at start, and dies at the first
request.

With LoRA enabled vLLM takes its Triton experts on every device. On a CPU a class in plain torch
replaces them. The class loops over the experts, so it suits tests and small models.

`tests/server/kernels/test_served_adapters.py` shows the effect, and that a server without this
class still dies.

Shape suffixes: T tokens, K experts per token, N tokens of one expert, E experts, H hidden, I expert
size.
"""

# pyright: reportMissingImports=false, reportSelfClsParameterName=false
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.oracle import unquantized

LEFT_OUT_VARIABLE = "LOCKSTEP_WITHOUT_CPU_MOE_LORA"
"""Set to 1 by the test that shows the fault."""


class TorchLoraExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
    """Gated SiLU experts with one adapter per token, in plain torch.

    sums are in fp32 and rounded where vLLM's kernels round.
    """

    @staticmethod
    def is_supported_config(cls, moe_config, weight_key, activation_key, activation_format):  # noqa: PLW0211 (as in the base class)
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Keeps the weights as they are, [E, 2I, H] and [E, H, I]: no packing."""
        self._use_zentorch = False

    def apply(
        self,
        output,
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        a1q_scale,
        a2_scale,
        workspace13,
        workspace2,
        expert_tokens_meta,
        apply_router_weight_on_input,
    ) -> None:
        plain = expert_map is None and not apply_router_weight_on_input and self.w1_bias is None
        if activation != MoEActivation.SILU or not plain:
            raise RuntimeError(
                "LoRA on experts on a CPU: only SiLU experts without bias or expert parallelism are supported"
            )
        slots_T = self._adapter_of_each_token(hidden_states.shape[0])
        sum_TH = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            token_N, place_N = (topk_ids == expert).nonzero(as_tuple=True)
            x_NH, slots_N = hidden_states[token_N], slots_T[token_N]
            y_NH = self._one_expert(x_NH, slots_N, w1[expert], w2[expert], expert)
            sum_TH.index_add_(0, token_N, y_NH * topk_weights[token_N, place_N].float()[:, None])
        output.copy_(sum_TH)

    def _adapter_of_each_token(self, tokens: int) -> torch.Tensor:
        context = self._lora_context
        if context is None or context.punica_wrapper.no_lora:
            return torch.full((tokens,), -1)
        return context.punica_wrapper.token_lora_indices[:tokens]

    def _one_expert(
        self, x_NH: torch.Tensor, slots_N: torch.Tensor, w1_2IH: torch.Tensor, w2_HI: torch.Tensor, expert: int
    ) -> torch.Tensor:
        h_N2I = (x_NH @ w1_2IH.T).float()
        used = [slot for slot in slots_N.unique().tolist() if slot >= 0]
        for slot in used:
            rows_N = slots_N == slot
            h_N2I[rows_N] += self._gate_up_delta(x_NH[rows_N], slot, expert)
        gate_NI, up_NI = h_N2I.chunk(2, -1)
        a_NI = (torch.nn.functional.silu(gate_NI) * up_NI).to(x_NH.dtype)
        y_NH = (a_NI @ w2_HI.T).float()
        for slot in used:
            rows_N = slots_N == slot
            context = self._lora_context
            y_NH[rows_N] += _product(
                a_NI[rows_N], context.w2_lora_a_stacked[0][slot, expert], context.w2_lora_b_stacked[0][slot, expert]
            )
        return y_NH

    def _gate_up_delta(self, x_NH: torch.Tensor, slot: int, expert: int) -> torch.Tensor:
        """One slice when gate and up share a pair (stacked adapters), two otherwise."""
        context = self._lora_context
        pairs = zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
        return torch.cat([_product(x_NH, a[slot, expert], b[slot, expert]) for a, b in pairs], dim=-1)


def _product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (x.float() @ a.float().T) @ b.float().T


def apply() -> None:
    """Makes vLLM choose this class for MoE models with LoRA, in this process. For the CPU platform
    only.
    """
    if os.environ.get(LEFT_OUT_VARIABLE) == "1":
        return
    choose_torch_experts(lambda moe_config: moe_config.is_lora_enabled)


def choose_torch_experts(wanted: Callable[[Any], bool]) -> None:
    """Makes vLLM choose this class where `wanted` says so of a layer's config, and what it chose
    before elsewhere.
    """
    original = unquantized.select_unquantized_moe_backend

    def select(moe_config):
        if wanted(moe_config):
            return unquantized.UnquantizedMoeBackend.CPU, TorchLoraExperts
        return original(moe_config)

    unquantized.select_unquantized_moe_backend = select
    unquantized_fused_moe_method.select_unquantized_moe_backend = select
