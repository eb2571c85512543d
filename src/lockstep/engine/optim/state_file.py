"""One safetensors file that all ranks write together, each its own parts, and any number of ranks
read.

Rank 0 lays the file out, since the header is known beforehand: full Hugging Face tensors, fp32 or
fp64. Then every rank writes its rectangles to their positions. What is on disk does not depend on
how the ranks split the model. All ranks must see the folder.

Source: the safetensors format, 8 bytes little-endian header length, JSON header, row-major data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.engine.optim.trainable import Trainable
from lockstep.engine.parallel.progress import progress
from lockstep.errors import StoreError, WeightsError
from lockstep.models.checkpoint.read import read_header
from lockstep.models.contract import Piece

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of one tensor (of expert `index` of a stack), and their position in a
    flattened slice of a parameter.
    """

    name: str
    index: int | None
    rows: slice
    columns: slice
    first: int
    last: int


def rectangles(trainable: Trainable, first: int, last: int) -> Iterator[Rectangle]:
    """Elements [first, last) of the flattened parameter, as rectangles of Hugging Face tensors.
    positions count from `first`.
    """
    width, row = trainable.row_width, 0
    for piece in trainable.pieces:
        low, high = max(first, row * width), min(last, (row + piece.rows) * width)
        if low < high and piece.name is not None:
            yield from _split(piece, row, width, low, high, first)
        row += piece.rows


def _split(piece: Piece, row: int, width: int, low: int, high: int, first: int) -> Iterator[Rectangle]:
    """A run of elements inside one piece: the end of a row, whole rows, the beginning of a row."""
    assert piece.name is not None
    left = piece.col_start or 0
    position = low
    while position < high:
        line, column = divmod(position, width)
        if column or high - position < width:
            stop, lines = min(high, (line + 1) * width), 1
        else:
            lines = (high - position) // width
            stop = position + lines * width
        start = line - row + piece.start
        columns = slice(left + column, left + (stop - 1) % width + 1)
        yield Rectangle(piece.name, piece.index, slice(start, start + lines), columns, position - first, stop - first)
        position = stop


def create(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str, metadata: Mapping[str, str]) -> None:
    """Write the header and reserve the data, zeros. One rank calls this before any writes.

    Raises StoreError where the disk has no room. A rank that wrote through its memory map would die
    of that silently.
    """
    item, offset = DTYPES[dtype].itemsize, 0
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name in sorted(shapes):
        size = int(np.prod(shapes[name], dtype=np.int64)) * item
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        try:
            if offset:
                os.posix_fallocate(file.fileno(), 8 + len(text), offset)
            os.fsync(file.fileno())
        except OSError as error:
            path.unlink()
            raise StoreError(f"{path} needs {offset} bytes: {error.strerror}; make room there and run again") from None


class StateFile:
    """An existing file, opened for reading, or also for writing rectangles into it.

    private: views can be written to, which changes this process's copy only. torch wants that of
        memory it looks at.
    """

    def __init__(self, path: Path, writable: bool = False, private: bool = False) -> None:
        self.path = path
        self.tensors = read_header(path)
        self._bytes = np.memmap(path, np.uint8, mode="r+" if writable else "c" if private else "r")

    def metadata(self) -> dict[str, str]:
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        return json.loads(self._bytes[8 : 8 + length].tobytes()).get("__metadata__", {})

    def view(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor in the file. Raises WeightsError when it is missing or has another shape."""
        stored = self.tensors.get(name)
        if stored is None:
            raise WeightsError(f"{self.path}: {name} is missing; the state belongs to another model or set of targets")
        if stored.shape != tuple(shape):
            raise WeightsError(f"{self.path}: {name} has shape {list(stored.shape)}, expected {list(shape)}")
        if stored.dtype not in DTYPES:
            raise WeightsError(f"{self.path}: {name} is {stored.dtype}, expected {' or '.join(DTYPES)}")
        return self._bytes[stored.start : stored.stop].view(DTYPES[stored.dtype]).reshape(stored.shape)

    def part(self, rectangle: Rectangle, prefix: str, shape: Sequence[int]) -> np.ndarray:
        """The rectangle's place in the file, writable if the file is."""
        progress.count += 1
        tensor = self.view(prefix + rectangle.name, shape)
        if rectangle.index is not None:
            tensor = tensor[rectangle.index]
        rows = tensor[rectangle.rows]
        return (
            rows.reshape(len(rows), -1)[:, rectangle.columns] if rows.flags.c_contiguous else rows[:, rectangle.columns]
        )

    def close(self) -> None:
        """Write everything to the disk."""
        if self._bytes.mode == "r+":
            self._bytes.flush()
        del self._bytes
