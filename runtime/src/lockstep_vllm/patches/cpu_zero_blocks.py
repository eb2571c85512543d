"""New blocks of the KV cache are cleared by the C library and not by a Triton kernel.

On a CPU Triton's interpreter runs the kernel, once for each 4 KiB of each layer. Hybrid models have
blocks of hundreds of tokens: a fifth of a server's time went there.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes


def apply() -> None:
    """For the CPU platform only."""
    from vllm.v1.worker import utils

    utils.KVBlockZeroer.zero_block_ids = zero_block_ids


def zero_block_ids(self, block_ids: list[int]) -> None:
    """Clear these blocks in every segment. Addresses are bytes; strides and sizes count 4 bytes."""
    if not block_ids or self._meta is None:
        return
    addresses, strides, sizes = (part.tolist() for part in self._meta[:3])
    for address, stride, size in zip(addresses, strides, sizes, strict=True):
        for block in block_ids:
            ctypes.memset(address + 4 * stride * block, 0, 4 * size)
