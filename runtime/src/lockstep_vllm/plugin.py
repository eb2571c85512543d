"""Entry points that vLLM calls. This module imports nothing but the standard library.

vLLM logs and skips a plugin that can't be *imported*, which would leave a server without it. So
imports happen inside the functions, where a failure ends the process.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from lockstep_vllm.version import VLLM_SERIES, vllm_version


def register() -> None:
    """`vllm.general_plugins`: called in the API process, the engine core and each worker."""
    from lockstep_vllm import patches
    from lockstep_vllm.patches import process_lifetime

    process_lifetime.die_with_parent()
    version = vllm_version()
    if not version.startswith(VLLM_SERIES):
        raise RuntimeError(
            f"lockstep-vllm is written for vLLM {VLLM_SERIES}x and found {version}: run `lockstep runtime install`, "
            "or point LOCKSTEP_RUNTIME_PYTHON at an environment that has it"
        )
    from vllm.platforms import current_platform

    patches.apply("every", current_platform.is_cpu())


def endpoints():
    """`vllm.endpoint_plugins`: our endpoints."""
    from lockstep_vllm.http.control_api import LockstepApi

    return LockstepApi()
