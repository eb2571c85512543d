"""vLLM's processes wait for each other asleep, not spinning, where they share few cores.

After each message the engine core spins for a second on the memory that it shares with its worker.
It keeps a core busy while the server serves: on two cores, half of the worker's capacity.

The message that wakes a reader may be lost. Its ZeroMQ socket holds one message and drops the next,
which a second of spinning hides. So a reader looks at the memory itself every few milliseconds.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import inspect

_LOOK_MS = 2
"""Milliseconds between two looks: what a lost message costs."""


def apply() -> None:
    """Readers go to sleep at once; a message wakes them, or the next look. For the CPU platform
    only.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    original, wait = shm_broadcast.SpinCondition.__init__, shm_broadcast.SpinCondition.wait
    if "busy_loop_s" not in inspect.signature(original).parameters:
        raise RuntimeError("vLLM's SpinCondition has no busy_loop_s: lockstep-vllm can't keep it from spinning")

    def init(self, is_reader, context, notify_address, busy_loop_s: float = 0.0) -> None:
        original(self, is_reader, context, notify_address, busy_loop_s)

    def wait_briefly(self, timeout_ms: int | None = None) -> None:
        wait(self, _LOOK_MS if timeout_ms is None else min(timeout_ms, _LOOK_MS))

    shm_broadcast.SpinCondition.__init__ = init
    shm_broadcast.SpinCondition.wait = wait_briefly
