"""Exact numerics on a CPU: the model of fp32 weights is computed in fp64, so that only the reported
numbers are rounded.

vLLM offers no fp64. In a server started with LOCKSTEP_EXACT=1 the worker's model, its caches and
its adapters are fp64. Every request for fp32 in vLLM's torch code gets fp64 while a step runs
(`Widened`). Plain torch replaces the compiled CPU kernels that know no fp64: matrix products,
rotary embedding, attention, experts, temperature and log-probabilities. Scheduling, prefix caching,
chunked prefill, adapters and sampling are vLLM's own. Slow: meant for tests and for small models.

`tests/server/test_exact.py` shows the effect, and that a server without this module is off by more
than 1e-6.

Shape suffixes: T tokens of a batch, N tokens of one request, C of its context, B requests, H query
heads, K key heads, D head size, V vocabulary.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

VARIABLE = "LOCKSTEP_EXACT"


class Widened(TorchFunctionMode):
    """While it is active, whatever asks torch for fp32 gets fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under `Widened`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Widened():
            return function(*args, **kwargs)

    return run


def attend(
    query_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    starts_B: torch.Tensor,
    lengths_B: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of each request's new tokens over its whole context, read from the paged
    cache. `[T, H, D]`.

    kv_cache: [blocks, K, block size, 2 D], keys before values.
    """
    out_THD = torch.empty_like(query_THD)
    block = kv_cache.shape[2]
    groups = query_THD.shape[1] // kv_cache.shape[1]
    starts = starts_B.tolist()
    for number, context in enumerate(lengths_B.tolist()):
        here = slice(starts[number], starts[number + 1])
        blocks = block_table[number, : -(-context // block)].long()
        kv_KC2D = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
        keys, values = kv_KC2D.repeat_interleave(groups, 0).chunk(2, -1)
        query_HND = query_THD[here].transpose(0, 1)
        tokens = query_HND.shape[1]
        seen_NC = torch.ones(tokens, context, dtype=torch.bool).tril(context - tokens)
        scores_HNC = (query_HND @ keys.mT * scale).masked_fill(~seen_NC, float("-inf"))
        out_THD[here] = (scores_HNC.softmax(-1) @ values).transpose(0, 1)
    return out_THD


def token_logprobs(logits_BV: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of `token_ids` [B, any], fp64."""
    return logits_BV.double().log_softmax(-1).gather(-1, token_ids.to(torch.int64))


def divide_by_temperature(
    logits_BV: torch.Tensor, expanded_idx_mapping: torch.Tensor, temperature: torch.Tensor
) -> None:
    """In place; greedy requests (temperature 0) stay as they are."""
    temperature_B = temperature[expanded_idx_mapping.long()].to(logits_BV.dtype)
    logits_BV.div_(torch.where(temperature_B == 0, 1.0, temperature_B)[:, None])


def apply() -> None:
    """Patches this process if the server was started for exact numerics. For the CPU platform and
    vLLM 0.32 only.
    """
    if os.environ.get(VARIABLE) != "1":
        return
    _fp64_model()
    _fp64_attention()
    _plain_kernels()
    _fp64_sampling()


def _fp64_model() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    init_device = CPUWorker.init_device

    def init_fp64(self: Any) -> None:
        self.model_config.dtype = torch.float64
        if self.vllm_config.lora_config is not None:
            self.vllm_config.lora_config.lora_dtype = torch.float64
        init_device(self)
        if not self.use_v2_model_runner:
            raise RuntimeError("exact numerics need vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=1")

    CPUWorker.init_device = init_fp64
    for name in ("execute_model", "sample_tokens"):
        setattr(GPUModelRunner, name, widened(getattr(GPUModelRunner, name)))


def _fp64_attention() -> None:
    from vllm.v1.attention.backends import cpu_attn

    def update(self: Any, layer: Any, key: Any, value: Any, kv_cache: torch.Tensor, slot_mapping: Any) -> None:
        used_T = slot_mapping >= 0
        slots_T = slot_mapping[used_T].long()
        block, place = slots_T // kv_cache.shape[2], slots_T % kv_cache.shape[2]
        both_TK2D = torch.cat((key[: len(used_T)], value[: len(used_T)]), -1)[used_T]
        kv_cache[block, :, place] = both_TK2D

    def forward(
        self: Any,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # a warm-up
            return output
        special = self.sliding_window != -1 or self.alibi_slopes is not None or self.sinks is not None
        if special or self.logits_soft_cap or not attn_metadata.causal:
            raise RuntimeError("exact numerics: only plain causal attention is supported")
        tokens = attn_metadata.num_actual_tokens
        output[:tokens] = attend(
            query[:tokens],
            kv_cache,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.scale,
        )
        return output

    cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update = update
    cpu_attn.CPUAttentionBackendImpl.forward = forward
    # The kernel's work plan, which nothing reads now; the kernel refuses fp64.
    cpu_attn.ops.cpu_attn_get_scheduler_metadata = lambda **_: None


def _plain_kernels() -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from lockstep_vllm.patches.cpu_moe_lora import choose_torch_experts

    def plain_product(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    utils.dispatch_cpu_unquantized_gemm = plain_product
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    choose_torch_experts(lambda _moe_config: True)


def _fp64_sampling() -> None:
    from vllm.v1.worker.gpu.sample import logprob, prompt_logprob, states

    for module in (logprob, prompt_logprob):
        module.compute_token_logprobs = token_logprobs
    states.apply_temperature = divide_by_temperature
