"""Two faults of vLLM 0.32 on CPU that leave old or garbled weights behind after any reload, without
an error.

1. MoE experts are packed into the CPU kernel's layout the first time only. A reload puts raw weights where packed ones are expected.
2. A tied `lm_head` keeps a packed copy of its own. A reload loads no weight of that name and leaves the copy.

`tests/server/kernels/test_cpu_reload.py` shows both with the fixes left out, so that it fails when
vLLM no longer needs them.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from typing import Any

import torch

LEFT_OUT_VARIABLE = "LOCKSTEP_WITHOUT_CPU_RELOAD_FIXES"
"""Set to 1 by the test that shows the faults."""


def apply() -> None:
    """Repairs both, in this process. For the CPU platform only."""
    if os.environ.get(LEFT_OUT_VARIABLE) == "1":
        return
    _repack_experts_on_reload()
    _repack_tied_head_on_reload()


def _repack_experts_on_reload() -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    original = UnquantizedFusedMoEMethod._setup_kernel

    def setup_kernel(self, layer, w13: torch.Tensor, w2: torch.Tensor) -> None:
        reload = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if reload:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = setup_kernel


def _repack_tied_head_on_reload() -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    original = layerwise.finalize_layerwise_processing

    def finalize(model: torch.nn.Module, model_config) -> None:
        original(model, model_config)
        repack_heads(model)

    layerwise.finalize_layerwise_processing = finalize


def repack_heads(model: torch.nn.Module) -> None:
    """Packs every output head's weights again; cheap, and harmless for a head that was just loaded."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            method: Any = module.quant_method
            method.process_weights_after_loading(module)
