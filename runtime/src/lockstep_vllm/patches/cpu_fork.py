"""On a CPU, vLLM's engine core and workers are forked and not spawned.

A spawned process imports vLLM anew, six seconds of a core each. On a CPU vLLM always spawns, for
the sake of threads that it binds to cores; Lockstep turns the binding off. Forking is safe at that
point: the API process has computed nothing yet, and its children begin with our plugin loaded.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
import signal
import sys

from lockstep_vllm.patches import process_lifetime


def apply() -> None:
    """Called once, in the API process, before vLLM reads its configuration."""
    if sys.platform != "linux":  # macOS's own libraries don't survive a fork
        return
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(_: type, vllm_config) -> None:
        original(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    parent = [os.getpid()]

    def before() -> None:
        parent[0] = os.getpid()

    def begin() -> None:
        signal.set_wakeup_fd(-1)  # else the parent's event loop would hear the child's signals
        process_lifetime.die_with(parent[0])

    os.register_at_fork(before=before, after_in_child=begin)
