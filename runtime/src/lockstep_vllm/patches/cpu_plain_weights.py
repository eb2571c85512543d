"""Weights on a CPU left as they are loaded, so that a sync's direct path runs without a GPU.

vLLM packs linear layers and experts for its CPU kernels and throws the plain ones away. With the
variable below set it multiplies plain matrices by torch's own kernels: slower on large models, the
same numbers. The convolution of GatedDeltaNet stays packed.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os

VARIABLE = "LOCKSTEP_PLAIN_CPU_WEIGHTS"


def apply() -> None:
    """Patches this process if the server was started for it. After `cpu_moe_lora`, whose experts
    are plain already.
    """
    if os.environ.get(VARIABLE) != "1":
        return
    from vllm.model_executor.layers import utils

    from lockstep_vllm.patches.cpu_moe_lora import choose_torch_experts

    utils.ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_shape_and_dtype: False
    choose_torch_experts(lambda _moe_config: True)
