"""Verification that the server holds what was sent: digests of the live memory, read back piece by
piece, against those of the received bytes.

What arrived is known to be what the trainer sent (`digest.py`). A plan copies pieces of memory
(`in_place_load.py`). When a bucket arrives, the plan's layout gives the digest of each piece: fused
owners, this worker's shard, the slot's dtype, B times alpha/rank. After the swap one pass over the
live pieces takes theirs. Equal digests tell a version from every other in any precision, and a
digest that differs names its weight.

Only numbers are kept in between: what overwrites a buffer or a parameter afterwards shows.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch

from lockstep_vllm.weight_sync.in_place_load import DirectPlan, Piece
from lockstep_wire.digest import Digests

_CHUNK = 1 << 22
_ODD = -7046029254386353131
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """A weight whose live memory differs from the sent bytes: the digest of what was sent, and of
    what is there.
    """

    name: str
    owner: str
    sent: str
    live: str


class Identity:
    """The pieces of a plan. Valid as long as they live where they did."""

    def __init__(
        self, plan: DirectPlan, device: torch.device, scaled: Container[int] = (), scaling: float = 1.0
    ) -> None:
        """scaled: addresses of the storages whose live elements are `scaling` times what is sent."""
        self._device, self._scaling = device, scaling
        self._buckets: list[list[tuple[int, Piece, bool]]] = []
        self._pieces: list[Piece] = []
        for pieces in plan.pieces:
            first = len(self._pieces)
            self._pieces += pieces
            times = [scaling != 1 and piece.target.untyped_storage().data_ptr() in scaled for piece in pieces]
            self._buckets.append([(first + i, p, times[i]) for i, p in enumerate(pieces)])

    def expect(self) -> Expected:
        """Digests of what is about to arrive."""
        return Expected(self._buckets, self._scaling, Digests(len(self._pieces), self._device))

    @torch.no_grad()
    def differing(self, sent: Sequence[str]) -> list[Difference]:
        """The weights whose live memory differs.

        sent: `Expected.read`. One pass over the live memory.
        """
        totals = Digests(len(self._pieces), self._device)
        for number, piece in enumerate(self._pieces):
            totals.add(number, _bytes(piece.target))
        return [
            Difference(piece.name, piece.owner, digest, other)
            for piece, digest, other in zip(self._pieces, sent, totals.read(), strict=True)
            if digest != other
        ]

    @torch.no_grad()
    def rearranged(self, owner: str, live: torch.Tensor, buffers: Sequence[torch.Tensor]) -> bool:
        """True if a parameter holds its sent bytes in another order, as kernels that permute or
        pack their weights keep it.

        buffers: one for each bucket. An element's place does not count here, nor do zeros.
        """
        wanted = sum(
            _sum_of_elements(_source(piece, bytes_N).to(live.dtype))
            for pieces, bytes_N in zip(self._buckets, buffers, strict=True)
            for _, piece, _ in pieces
            if piece.owner == owner
        )
        return (wanted - _sum_of_elements(live)) % (1 << 64) == 0


class Expected:
    """The digests of one sync's pieces, as its buckets arrive."""

    def __init__(self, buckets: Sequence[Sequence[tuple[int, Piece, bool]]], scaling: float, totals: Digests) -> None:
        self._buckets, self._scaling, self._totals = buckets, scaling, totals

    @torch.no_grad()
    def add(self, bucket: int, bytes_N: torch.Tensor) -> None:
        """On a GPU, queued on the current stream."""
        for number, piece, times in self._buckets[bucket]:
            sent = _source(piece, bytes_N).to(piece.target.dtype)
            # As the slot does: rounded to its dtype, then multiplied and rounded again.
            self._totals.add(number, _bytes(sent * self._scaling if times else sent))

    def read(self) -> list[str]:
        return self._totals.read()


def described(version: str, worker: int, differences: Sequence[Difference]) -> str:
    """The refusal's one line."""
    first, more = differences[0], len(differences) - 1
    others = f", and so do {more} more, {differences[1].name!r} first" if more else ""
    return (
        f"worker {worker} does not hold {version}: {first.name!r} is not what was sent, its digest in the live memory is "
        f"{first.live} and should be {first.sent}{others}"
    )


def _source(piece: Piece, bytes_N: torch.Tensor) -> torch.Tensor:
    """The piece's elements in a bucket's buffer."""
    size = piece.dtype.itemsize
    typed_N = bytes_N[: bytes_N.numel() // size * size].view(piece.dtype)
    return typed_N.as_strided(piece.sizes, piece.strides, piece.start(typed_N))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8, in one piece, beginning where 8-byte words may: a copy where the tensor is otherwise."""
    flat = tensor.contiguous().view(-1)
    if flat.data_ptr() % 8 or flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    return flat.view(torch.uint8)


def _sum_of_elements(tensor: torch.Tensor) -> int:
    """Sum, modulo 2**64, of a mixture of every element's bits; zeros add nothing."""
    bits_N = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits_N.numel(), _CHUNK):
        mixed = bits_N[start : start + _CHUNK].to(torch.int64) * _ODD
        total += ((mixed ^ (mixed >> 29)) * _ODD).sum()
    return int(total)
