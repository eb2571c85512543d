"""A Hugging Face checkpoint folder read as it is: which file holds a tensor, where its bytes lie,
and slices of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import WeightsError
from lockstep.models.contract import Layout, Piece
from lockstep.models.handler import tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from lockstep.models.config import ModelConfig
    from lockstep.models.handler import ModelSupportHandler

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file: dtype as the file spells it ("BF16"), and its byte range
    counted from the file's start.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file (format: 8 bytes little-endian header length, JSON header,
    data).

    Raises WeightsError when the file is truncated or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise WeightsError(f"{path} is no complete safetensors file; download or write it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            tensors = {
                name: _stored(path.name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise WeightsError(f"{path} has a damaged header ({error!r}); download or write it again") from error
    base = 8 + length
    if max((t.stop for t in tensors.values()), default=base) != size:
        raise WeightsError(f"{path} has {size} bytes, which is not what its header says; download or write it again")
    return tensors


def _stored(file: str, entry: Mapping[str, Any], base: int) -> Stored:
    start, stop = entry["data_offsets"]
    return Stored(file, entry["dtype"], tuple(entry["shape"]), base + start, base + stop)


class Checkpoint:
    """The tensors of a folder. Handles are opened on first read and dropped by `release`, which
    also unmaps what was read.

    `layout` and `trained` (the names that the family's contract reads) are known once
    `open_checkpoint` has checked it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.tensors = _all_tensors(self.folder)
        self.layout = Layout()
        self.trained: set[str] = set()
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> set[str]:
        return set(self.tensors)

    @property
    def mixed(self) -> bool:
        """True if the embedding is stored narrower than fp32. The checkpoint's fp32 tensors are then
        fp32 on purpose.
        """
        embedding = self.tensors.get(f"{self.layout.prefix}embed_tokens.weight")
        return embedding is not None and embedding.dtype != "F32"

    def release(self) -> None:
        self._open.clear()

    def read(self, piece: Piece) -> Tensor:
        """The slice of one tensor that a piece names; only its bytes are read."""
        from safetensors import safe_open

        assert piece.name is not None
        file = self.tensors[piece.name].file
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        window: tuple[int | slice, ...] = (slice(piece.start, piece.stop),)
        if piece.index is not None:
            window = (piece.index, *window)
        if piece.col_start is not None:
            window = (*window, slice(piece.col_start, piece.col_stop))
        return self._open[file].get_slice(piece.name)[window]


def open_checkpoint(folder: Path | str, handler: ModelSupportHandler, config: ModelConfig) -> Checkpoint:
    """A checkpoint that has exactly the tensors its family's contract asks for, each of the right
    shape, and knows its layout.

    A tensor is used, or carried over because the family's spec skips its name. Any other tensor
    raises WeightsError, and so does a missing one.
    """
    checkpoint = Checkpoint(folder)
    checkpoint.layout = handler.layout(config, checkpoint.names)
    wanted = expected_tensors(handler, config, checkpoint.layout)
    unknown = sorted(n for n in checkpoint.names if n not in wanted and handler.skip_reason(n) is None)
    if unknown:
        raise WeightsError(
            f"{folder}: {_some(unknown)} in the checkpoint but unknown to {handler.spec.key}; "
            "its weights would be lost, so nothing is loaded"
        )
    missing = sorted(set(wanted) - checkpoint.names)
    if missing:
        raise WeightsError(
            f"{folder}: {_some(missing)} missing from the checkpoint; download it again or check its config.json"
        )
    for name, shape in wanted.items():
        if checkpoint.tensors[name].shape != shape:
            stored_shape = list(checkpoint.tensors[name].shape)
            raise WeightsError(
                f"{folder}: {name} has shape {stored_shape}, but config.json implies {list(shape)}; they don't belong together"
            )
    checkpoint.trained = set(wanted)
    return checkpoint


def expected_tensors(handler: ModelSupportHandler, config: ModelConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Full shape of every tensor a checkpoint in this layout must have."""
    shapes = tensor_shapes(handler.all_shards(config, layout))
    if layout.stored_tied_head:
        shapes["lm_head.weight"] = shapes[f"{layout.prefix}embed_tokens.weight"]
    return shapes


def _all_tensors(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map: Mapping[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{index} is damaged ({error!r}); download or write it again") from error
    else:
        weight_map, files = {}, ["model.safetensors"]
    absent = [f for f in files if not (folder / f).is_file()]
    if absent:
        raise WeightsError(f"{folder} lacks {_some(absent)}; give a folder with safetensors weights")
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(folder / file).items():
            if name in tensors:
                raise WeightsError(f"{folder}: {name} is both in {tensors[name].file} and in {file}; keep one")
            if weight_map and weight_map.get(name) != file:
                raise WeightsError(
                    f"{folder}: {name} is in {file}, but {INDEX} says {weight_map.get(name)}; write the index again"
                )
            tensors[name] = stored
    if set(weight_map) - set(tensors):
        raise WeightsError(
            f"{folder}: {INDEX} names {_some(sorted(set(weight_map) - set(tensors)))}, which no file holds"
        )
    return tensors


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
