"""vLLM's processes wait for each other asleep, not spinning, where they share few cores.

The engine core spins for a second after each message on the memory that it shares with its worker, so it keeps a core
busy for as long as the server serves: on a machine of two cores half of what the worker could have had.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import inspect


def apply() -> None:
    """Readers go to sleep at once; a message wakes them. For the CPU platform only."""
    from vllm.distributed.device_communicators import shm_broadcast

    original = shm_broadcast.SpinCondition.__init__
    if "busy_loop_s" not in inspect.signature(original).parameters:
        raise RuntimeError("vLLM's SpinCondition has no busy_loop_s: lockstep-vllm can't keep it from spinning")

    def init(self, is_reader, context, notify_address, busy_loop_s: float = 0.0) -> None:
        original(self, is_reader, context, notify_address, busy_loop_s)

    shm_broadcast.SpinCondition.__init__ = init
