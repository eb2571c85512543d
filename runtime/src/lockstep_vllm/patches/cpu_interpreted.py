"""Less work for kernels of a hybrid model's cache, which Triton's interpreter runs on a CPU.

One kernel clears new blocks, a program for each 4 KiB of each layer: the C library does that. Two
others move recurrent states where a request enters another block, a program for each request,
state and tile. Most requests stay in their block: these are left out. Together they took half of a
server's time.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes
from typing import Any


def apply() -> None:
    """For the CPU platform only."""
    from vllm.v1.worker import mamba_utils, utils

    utils.KVBlockZeroer.zero_block_ids = zero_block_ids
    context = mamba_utils.MambaSpecDecodeGPUContext
    context.run_fused_precopy = before_the_pass(context.run_fused_precopy)
    context.run_fused_postprocess_align = after_the_pass(context.run_fused_postprocess_align)


def zero_block_ids(self, block_ids: list[int]) -> None:
    """Clear these blocks in every segment. Addresses are bytes; strides and sizes count 4 bytes."""
    if not block_ids or self._meta is None:
        return
    addresses, strides, sizes = (part.tolist() for part in self._meta[:3])
    for address, stride, size in zip(addresses, strides, sizes, strict=True):
        for block in block_ids:
            ctypes.memset(address + 4 * stride * block, 0, 4 * size)


def before_the_pass(original: Any) -> Any:
    """Copies the state of requests whose block changes. The kernel's own rule: the source is known,
    and is not the target.
    """

    def run_fused_precopy(self, count, state, source, bias, slots) -> None:
        if slots is None:
            return original(self, count, state, source, bias, slots)
        slots = _valid(slots, count)
        from_, to = source[slots], state[slots]
        moved = slots[(from_ >= 0) & (from_ != to)]
        return original(self, len(moved), state, source, bias, moved)

    return run_fused_precopy


def after_the_pass(original: Any) -> Any:
    """Keeps the state of requests that have filled a block. The kernel's own rule: the last full
    block ends with a token of this step.
    """

    def run_fused_postprocess_align(self, count, accepted, state, computed, slots) -> None:
        slots = _valid(slots, count)
        after = computed[slots]
        full = after // self.block_size * self.block_size
        ended = slots[full >= after - accepted[slots] + 1]
        return original(self, len(ended), accepted, state, computed, ended)

    return run_fused_postprocess_align


def _valid(slots: Any, count: int) -> Any:
    slots = slots[:count]
    return slots[slots >= 0].long()
