"""A checksum of a bucket that costs one pass on the device the bucket lies on.

It proves that what was received is what was sent: any changed, missing, repeated or moved 8-byte word changes it, up to
chance. It is not a defence against somebody who wants two buckets to agree. The receiver has the same function
(`lockstep_vllm.digest`), and a test holds the two together.
"""

from __future__ import annotations

import torch

# Odd, so that multiplying by it loses nothing modulo 2**64; the bits of the golden ratio.
_STEP = -7046029254386353131
_CHUNK_WORDS = 1 << 22


def digest(bytes_N: torch.Tensor, seed: int) -> str:
    """Sum over the 8-byte words of word times an odd number that depends on its position and `seed`, modulo 2**64.

    bytes_N: uint8, 1-D, contiguous; a tail shorter than a word is filled up with zeros. seed: the bucket's index, so
    that two buckets which changed places are seen. Returns 16 hexadecimal digits.
    """
    whole = bytes_N.numel() // 8 * 8
    total = torch.zeros((), dtype=torch.int64, device=bytes_N.device)
    words = bytes_N[:whole].view(torch.int64)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        total += (chunk * _weights(start, chunk.numel(), seed, chunk.device)).sum()
    if whole != bytes_N.numel():
        tail = torch.zeros(8, dtype=torch.uint8, device=bytes_N.device)
        tail[: bytes_N.numel() - whole] = bytes_N[whole:]
        total += (tail.view(torch.int64) * _weights(words.numel(), 1, seed, tail.device)).sum()
    return f"{int(total) & (1 << 64) - 1:016x}"


def _weights(start: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """Odd multipliers of the words from `start` on, spread over all 64 bits."""
    position = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device) + (seed << 32)
    mixed = position * _STEP
    return (mixed ^ (mixed >> 29)) * _STEP | 1
