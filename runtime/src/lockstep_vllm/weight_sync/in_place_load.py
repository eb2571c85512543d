"""The direct path of a weight sync: every shipped box is copied to its address in the live
parameters, without Python per weight.

The plan is not written by hand per model. vLLM's own `load_weights` runs once on weights that have
shape and no bytes. Every copy into a live parameter is recorded and not done. Each recorded copy
reads a slice of a Hugging Face tensor. Its overlap with a slice that a sender ships becomes one
planned copy: bucket offset to parameter address. Copies whose bytes follow each other on both sides
are joined, so that a layer's experts are one copy. From then on a sync repeats them. Same copies,
same bytes, whatever the family, the senders' layout, and whatever slice of a tensor this worker
holds.

It holds only where a parameter stays as `load_weights` leaves it. A server that packs or permutes
weights after loading them (linear layers on a CPU, some expert kernels) needs the other path. After
a load by that path, `matches` checks whether the plan would have written the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lockstep_wire.plan import Box, TensorMeta, WireBucket

_EXPERT = re.compile(r"\.experts\.\d+\..*")
_CONSTANTS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


class DirectUnavailableError(ValueError):
    """This model's weights can't be copied in place; the message says which and why."""


@dataclass(frozen=True)
class Piece:
    """The target, and the source in a bucket of bytes: element sizes and strides, offset in bytes.

    owner: name of the live parameter.
    name: of the weight; experts that come one by one count as one, their layer's.
    """

    target: torch.Tensor
    dtype: torch.dtype
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    owner: str = ""
    name: str = ""

    def start(self, typed_N: torch.Tensor) -> int:
        """The offset in the storage of a bucket, counted in elements of its dtype."""
        return int(typed_N.storage_offset()) + self.offset // self.dtype.itemsize


class DirectPlan:
    """The pieces of every bucket. Valid as long as the parameters live where they did."""

    def __init__(self, pieces: Sequence[Sequence[Piece]], keep_views: bool = True) -> None:
        """keep_views: the buffers come back from sync to sync; views of them are kept, and so is
        their memory.
        """
        self.pieces = tuple(tuple(_joined(bucket, apart=True)) for bucket in pieces)
        """Those of each bucket, as few as they can be with one weight's name for each:
        `identity.py` names what differs.
        """
        self._pieces, self._keep_views = [_joined(bucket) for bucket in pieces], keep_views
        self._views: dict[tuple[int, int], list[tuple[list[torch.Tensor], list[torch.Tensor]]]] = {}
        # Apart, since one strided copy slows a whole list down.
        parts = [
            [[p for p in bucket if (p.strides == (1,)) == flat] for flat in (True, False)] for bucket in self._pieces
        ]
        self._groups = [[(part, [piece.target for piece in part]) for part in bucket if part] for bucket in parts]

    def __len__(self) -> int:
        return sum(len(pieces) for pieces in self._pieces)

    @torch.no_grad()
    def copy(self, bucket: int, bytes_N: torch.Tensor) -> None:
        """Copies what a bucket's buffer holds now into the live parameters; on a GPU, queued on the
        current stream.
        """
        for targets, sources in self._pairs(bucket, bytes_N):
            torch._foreach_copy_(targets, sources)

    def matches(self, bucket: int, bytes_N: torch.Tensor) -> bool:
        """True if the live parameters hold exactly what `copy` would write."""
        return all(
            torch.equal(target, source.to(target.dtype))
            for targets, sources in self._pairs(bucket, bytes_N)
            for target, source in zip(targets, sources, strict=True)
        )

    def forget_buffers(self) -> None:
        """Drops the views of buffers that `copy` and `matches` kept: a buffer that nobody else
        holds is freed.
        """
        self._views.clear()

    def _pairs(self, bucket: int, bytes_N: torch.Tensor) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """The live views of a bucket's pieces, and those of its buffer."""
        key = (bucket, bytes_N.data_ptr())
        if key in self._views:
            return self._views[key]
        typed: dict[torch.dtype, torch.Tensor] = {}
        pairs = []
        for part, targets in self._groups[bucket]:
            for dtype in {piece.dtype for piece in part} - typed.keys():
                typed[dtype] = bytes_N[: bytes_N.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
            sources = [typed[p.dtype].as_strided(p.sizes, p.strides, p.start(typed[p.dtype])) for p in part]
            pairs.append((targets, sources))
        if self._keep_views:
            self._views[key] = pairs
        return pairs

    def written(self) -> dict[int, int]:
        """Elements written, by the address of the memory they lie in."""
        sizes: dict[int, int] = {}
        for piece in (piece for pieces in self._pieces for piece in pieces):
            sizes[_storage(piece.target)] = sizes.get(_storage(piece.target), 0) + piece.target.numel()
        return sizes


def make_plan(
    parameters: Mapping[str, torch.Tensor],
    metas: Mapping[str, TensorMeta],
    buckets: Sequence[WireBucket],
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object],
    *,
    complete: bool = True,
    keep_views: bool = True,
) -> DirectPlan:
    """Runs `load` (a model's `load_weights`) once, on weights without bytes, and returns the copies
    it would make. Nothing live changes.

    parameters: the live ones, by name; two names of one tensor count once.
    metas: the weights under their shipped names; `load` gets them in this order.
    complete: every parameter is written in full, as a model's are and an adapter's need not be.
    keep_views: see `DirectPlan`.

    Raises DirectUnavailableError when a parameter is filled from anything but the weights, or
    (complete) not exactly once.
    """
    recorder = _Recorder(parameters, complete)
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    with torch.no_grad(), recorder:
        load([(name, _Ghost(name, meta, device)) for name, meta in metas.items()])
    if complete:
        recorder.check()
    shipped: dict[str, list[tuple[int, Any]]] = {}
    for number, bucket in enumerate(buckets):
        for slot in bucket.slots:
            shipped.setdefault(slot.name, []).append((number, slot))
    pieces: list[list[Piece]] = [[] for _ in buckets]
    for copy in recorder.copies:
        source = _Box.of(copy)
        for number, slot in shipped[copy.name]:
            piece = source.meet(slot.box, slot.offset, slot.meta)
            if piece is not None:
                pieces[number].append(piece)
    return DirectPlan(pieces, keep_views)


class _Ghost(torch.Tensor):
    """A weight on the parameters' device with shape, strides and no bytes; it can be viewed and
    copied from, nothing else.
    """

    weight: str
    full: TensorMeta
    shapes: torch.Tensor

    @staticmethod
    def __new__(cls, name: str, meta: TensorMeta, device: torch.device, inner: torch.Tensor | None = None):
        if inner is None:
            inner = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.weight, made.full, made.shapes = name, meta, inner
        return made

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"<{self.weight} {tuple(self.shapes.shape)}>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DirectUnavailableError(f"weights without bytes were used outside of planning ({func})")


@dataclass(frozen=True)
class _Copy:
    """A noted copy: the live view written, and the view of a weight it was read from."""

    owner: str
    name: str
    full: TensorMeta
    target: torch.Tensor
    view: torch.Tensor


class _Recorder(TorchDispatchMode):
    """Notes every copy whose target lies in a live parameter, and keeps it from happening."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], complete: bool) -> None:
        super().__init__()
        self._complete = complete
        self.copies: list[_Copy] = []
        self._live: dict[int, str] = {}
        self._sizes: dict[str, int] = {}
        for name, parameter in parameters.items():
            if parameter.numel() == 0:
                raise DirectUnavailableError(f"{name!r} is packed away after loading: use the load_weights path")
            if _storage(parameter) not in self._live:
                self._live[_storage(parameter)] = name
                self._sizes[name] = parameter.numel()
        self._filled = dict.fromkeys(self._sizes, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func._schema.is_mutable and isinstance(first, torch.Tensor) and not isinstance(first, _Ghost):
            name = self._live.get(_storage(first))
            if name is not None:
                self._note(name, func, args)
                return first
        ghosts = [a for a in tree_leaves((args, kwargs)) if isinstance(a, _Ghost)]
        if not ghosts:
            return func(*args, **kwargs)
        return self._view(func, ghosts[0], args, kwargs)

    def _view(self, func: Any, ghost: _Ghost, args: Any, kwargs: Any) -> Any:
        """Views of a ghost are ghosts; anything that would read its bytes can't be planned."""
        if func._schema.is_mutable or not any(r.alias_info is not None for r in func._schema.returns):
            raise DirectUnavailableError(f"{ghost.weight!r} is computed with while it is loaded ({func})")
        bare, named = tree_map_only(_Ghost, lambda argument: argument.shapes, (args, kwargs))
        result = func(*bare, **named)
        wrap = lambda inner: _Ghost(ghost.weight, ghost.full, ghost.device, inner)  # noqa: E731
        return [wrap(item) for item in result] if isinstance(result, (list, tuple)) else wrap(result)

    def _note(self, name: str, func: Any, args: tuple[Any, ...]) -> None:
        if func in _CONSTANTS:  # padding: it stays as it is, but a parameter filled and then written counts too often
            self._filled[name] += args[0].numel()
            return
        if not self._complete and not any(isinstance(arg, _Ghost) for arg in args):
            return  # a constant in whatever form
        if func is not torch.ops.aten.copy_.default or not isinstance(args[1], _Ghost):
            raise DirectUnavailableError(f"{name!r} is computed while it is loaded ({func}): use the load_weights path")
        if args[0].numel() != args[1].numel():
            raise DirectUnavailableError(f"{name!r} is filled with a repeated value: use the load_weights path")
        # A detached view of the same memory, so that repeating the copy meets no autograd and no
        # parameter subclass.
        self.copies.append(_Copy(name, args[1].weight, args[1].full, args[0].detach(), args[1].shapes))
        self._filled[name] += args[0].numel()

    def check(self) -> None:
        """Every element of every parameter was written exactly once (as counted)."""
        for name, size in self._sizes.items():
            if self._filled[name] != size:
                raise DirectUnavailableError(
                    f"{name!r} has {size} elements and {self._filled[name]} were loaded: use the load_weights path"
                )


@dataclass(frozen=True)
class _Box:
    """A copy as a box of its weight: `dims[i]` is the weight's dimension that the target's
    dimension i runs along.
    """

    box: Box
    dims: tuple[int, ...]
    target: torch.Tensor
    owner: str
    name: str

    @staticmethod
    def of(copy: _Copy) -> _Box:
        """Raises DirectUnavailableError for a view that is no box (dimensions flattened together,
        steps).
        """
        shape, view = copy.full.shape, copy.view
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        left, low = view.storage_offset(), []
        for stride in strides:
            low.append(left // max(1, stride))
            left -= low[-1] * stride
        ranges = [(start, start + 1) for start in low]
        dims: list[int] = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            if size == 1:
                continue
            dim = next((d for d, other in enumerate(strides) if other == stride and shape[d] > 1), None)
            if dim is None or dim in dims or low[dim] + size > shape[dim]:
                raise DirectUnavailableError(f"{copy.owner!r} takes no box of {copy.name!r}: use the load_weights path")
            ranges[dim] = (low[dim], low[dim] + size)
            dims.append(dim)
        target = copy.target.squeeze()
        if tuple(target.shape) != tuple(size for size in view.shape if size > 1):
            raise DirectUnavailableError(f"{copy.owner!r} reshapes {copy.name!r}: use the load_weights path")
        return _Box(tuple(ranges), tuple(dims), target, copy.owner, _EXPERT.sub(".experts", copy.name))

    def meet(self, shipped: Box, offset: int, meta: TensorMeta) -> Piece | None:
        """The part of this copy that lies in a shipped box, whose bytes start at `offset`; None
        when they don't meet.
        """
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.box, shipped, strict=True)]
        if any(low >= high for low, high in common):
            return None
        extents = [high - low for low, high in shipped]
        strides = [math.prod(extents[d + 1 :]) for d in range(len(extents))]
        start = sum((low - s[0]) * stride for (low, _), s, stride in zip(common, shipped, strides, strict=True))
        target = self.target
        for i, dim in enumerate(self.dims):
            low, high = common[dim]
            target = target.narrow(i, low - self.box[dim][0], high - low)
        sizes = tuple(common[dim][1] - common[dim][0] for dim in self.dims)
        byte = offset + start * meta.dtype.itemsize
        strides = [strides[dim] for dim in self.dims]
        return _flat(Piece(target, meta.dtype, byte, sizes, tuple(strides), self.owner, self.name))


def _flat(piece: Piece) -> Piece:
    """The piece as one run of elements, where it is one on both sides."""
    expected, count = [], 1
    for size in reversed(piece.sizes):
        expected.append(count)
        count *= size
    kept = [(s, want) for s, size, want in zip(piece.strides, piece.sizes, reversed(expected), strict=True) if size > 1]
    if all(stride == want for stride, want in kept) and piece.target.is_contiguous():
        return replace(piece, target=piece.target.view(-1), sizes=(count,), strides=(1,))
    return piece


def _joined(pieces: Sequence[Piece], apart: bool = False) -> list[Piece]:
    """Neighbours on both sides as one.

    apart: only where they belong to the same weight.
    """
    done: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        last = done[-1] if done else None
        if last is not None and _follows(last, piece) and (not apart or last.name == piece.name):
            target = last.target.as_strided((last.sizes[0] + piece.sizes[0],), (1,), last.target.storage_offset())
            done[-1] = replace(last, target=target, sizes=tuple(target.shape))
        else:
            done.append(piece)
    return done


def _follows(last: Piece, piece: Piece) -> bool:
    if not (last.strides == piece.strides == (1,)) or last.dtype != piece.dtype:
        return False
    first, two = last.target, piece.target
    return (
        last.offset + last.sizes[0] * last.dtype.itemsize == piece.offset
        and _storage(first) == _storage(two)
        and first.dtype == two.dtype
        and first.data_ptr() + first.numel() * first.element_size() == two.data_ptr()
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
