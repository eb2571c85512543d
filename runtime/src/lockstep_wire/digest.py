"""A checksum of a bucket that costs one pass on the device the bucket lies on.

The digest shows that the bytes received are the bytes sent. Any changed, missing, repeated or moved
8-byte word changes the digest, up to chance. It is not a defence against somebody who wants two
buckets to agree.
"""

from __future__ import annotations

from typing import Any

import torch

# Odd, so that multiplying by it loses nothing modulo 2**64; the bits of the golden ratio.
_STEP = -7046029254386353131
_CHUNK_WORDS = 1 << 15  # what belongs to more would not stay in a CPU's cache
_BLOCK_WORDS = 4096


def digest(bytes_N: torch.Tensor, seed: int) -> str:
    """Sum over the 8-byte words of word times an odd number that depends on its position and
    `seed`, modulo 2**64.

    bytes_N: uint8, 1-D, contiguous; a tail shorter than a word is filled up with zeros.
    seed: the bucket's index, so that two buckets which changed places are seen.

    Returns 16 hexadecimal digits.
    """
    total = torch.zeros(1, dtype=torch.int64, device=bytes_N.device)
    _add(bytes_N, seed, total)
    return _hexadecimal(int(total))


class Digests:
    """The digests of a sync's buckets, left on the device until they are read: a GPU is asked once,
    at the end.
    """

    def __init__(self, buckets: int, device: torch.device) -> None:
        self._totals = torch.zeros(buckets, dtype=torch.int64, device=device)

    def add(self, index: int, bytes_N: torch.Tensor, seed: int | None = None) -> None:
        """`digest` of bucket `index`; on a GPU, queued on the current stream.

        seed: the index unless given.
        """
        _add(bytes_N, index if seed is None else seed, self._totals[index : index + 1])

    def read(self) -> list[str]:
        return [_hexadecimal(total) for total in self._totals.tolist()]


def _hexadecimal(total: int) -> str:
    return f"{total & (1 << 64) - 1:016x}"


def _add(bytes_N: torch.Tensor, seed: int, total: torch.Tensor) -> None:
    aligned = bytes_N.numel() // 8 * 8
    words = bytes_N[:aligned].view(torch.int64)
    if bytes_N.is_cuda:
        fused_sum(words, 0, seed, total)
    else:
        for start in range(0, words.numel(), _CHUNK_WORDS):
            _sum(words[start : start + _CHUNK_WORDS], start, seed, total)
    if aligned != bytes_N.numel():
        tail = torch.zeros(8, dtype=torch.uint8, device=bytes_N.device)
        tail[: bytes_N.numel() - aligned] = bytes_N[aligned:]
        _sum(tail.view(torch.int64), words.numel(), seed, total)


def _sum(words: torch.Tensor, first: int, seed: int, total: torch.Tensor) -> None:
    total += (words * _weights(first, words.numel(), seed, words.device)).sum()


def _weights(start: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """Odd multipliers of the words from `start` on, spread over all 64 bits."""
    position = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device) + (seed << 32)
    mixed = position * _STEP
    return (mixed ^ (mixed >> 29)) * _STEP | 1


def fused_sum(words: torch.Tensor, first: int, seed: int, total: torch.Tensor) -> None:
    """The same sum in one pass over the words and no temporary; addition modulo 2**64 has no order,
    so the bits agree.
    """
    from lockstep_wire.digest_kernel import digest_kernel

    kernel: Any = digest_kernel  # Triton has no stubs for it
    if words.numel():
        grid = (-(-words.numel() // _BLOCK_WORDS),)
        kernel[grid](words, total, words.numel(), first, seed, STEP=_STEP, BLOCK=_BLOCK_WORDS)
