"""Entry points that vLLM calls. This module imports nothing but the standard library.

vLLM logs and skips a plugin that can't be *imported*, which would leave a server without it. So imports happen inside
the functions, where a failure ends the process.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from lockstep_vllm.version import VLLM_SERIES, vllm_version


def register() -> None:
    """`vllm.general_plugins`: called in the API process, the engine core and each worker."""
    from lockstep_vllm.patches import process_lifetime
    from lockstep_vllm.routed_experts import capture

    process_lifetime.die_with_parent()
    version = vllm_version()
    if not version.startswith(VLLM_SERIES):
        raise RuntimeError(
            f"lockstep-vllm is written for vLLM {VLLM_SERIES}x and found {version}: run `lockstep runtime install`, "
            "or point LOCKSTEP_RUNTIME_PYTHON at an environment that has it"
        )
    capture.apply()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from lockstep_vllm.patches import (
            cpu_fork,
            cpu_lora,
            cpu_moe_lora,
            cpu_plain_weights,
            cpu_reload,
            cpu_waiting,
            exact_fp64,
        )

        cpu_reload.apply()
        cpu_lora.apply()
        cpu_waiting.apply()
        cpu_moe_lora.apply()
        if cpu_plain_weights.wanted():
            cpu_plain_weights.apply()
        exact_fp64.apply()
        cpu_fork.apply()


def endpoints():
    """`vllm.endpoint_plugins`: our routes."""
    from lockstep_vllm.http.control_api import LockstepRoutes

    return LockstepRoutes()
