"""A changed model written back as a Hugging Face folder, byte for byte in the form of the
checkpoint it came from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lockstep.errors import WeightsError
from lockstep.models.checkpoint.read import Checkpoint
from lockstep.process.durable import fsync_all

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md", ".py")
_FOREIGN_INDEXES = ("pytorch_model.bin.index.json",)


def export_checkpoint(source: Checkpoint, tensors: Iterable[tuple[str, Tensor]], target: Path | str) -> Path:
    """Write `tensors` (Hugging Face names) over a copy of the checkpoint `source` and return the
    new folder.

    Each tensor gets the file, position and dtype that it has in `source`, and is rounded once if it
    is held in a wider dtype. Tensors that aren't given keep their bytes, and so do config.json, the
    tokenizer and the index. Nothing appears under `target` before all is written. Raises
    WeightsError for a tensor that the source lacks, that has another shape, or that comes twice.
    Raises it also when a trained tensor is missing.
    """
    target = Path(target)
    if target.exists():
        raise WeightsError(f"{target} already exists; give a new folder")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _copy_files(source, partial)
        _write_tensors(source, tensors, partial)
        fsync_all(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _copy_files(source: Checkpoint, partial: Path) -> None:
    weights = {stored.file for stored in source.tensors.values()}
    for path in sorted(source.folder.iterdir()):
        known = path.name in weights or (path.suffix in _KEPT_SUFFIXES and path.name not in _FOREIGN_INDEXES)
        if path.is_file() and known:
            shutil.copyfile(path, partial / path.name)


def _write_tensors(source: Checkpoint, tensors: Iterable[tuple[str, Tensor]], partial: Path) -> None:
    embedding = f"{source.layout.prefix}embed_tokens.weight"
    written: set[str] = set()
    for name, tensor in tensors:
        if name in written:
            raise WeightsError(f"{name} came twice; export every tensor once")
        _write_one(source, name, tensor, partial)
        written.add(name)
        if name == embedding and source.layout.stored_tied_head:
            _write_one(source, "lm_head.weight", tensor, partial)
            written.add("lm_head.weight")
    missing = sorted(source.trained - written)
    if missing:
        raise WeightsError(
            f"{missing[0]} ({len(missing)} tensors) was not exported; the folder would mix old and new weights"
        )


def _write_one(source: Checkpoint, name: str, tensor: Tensor, partial: Path) -> None:
    stored = source.tensors.get(name)
    if stored is None:
        raise WeightsError(f"{name} is not in {source.folder}; export needs the checkpoint the model was loaded from")
    if tuple(tensor.shape) != stored.shape or stored.dtype not in _DTYPES:
        raise WeightsError(
            f"{name}: {list(tensor.shape)} can't replace {list(stored.shape)} {stored.dtype} of {source.folder}"
        )
    data = tensor.detach().to(device="cpu", dtype=_DTYPES[stored.dtype]).contiguous()
    with (partial / stored.file).open("r+b") as file:
        file.seek(stored.start)
        file.write(
            data.view(torch.uint8).numpy().data if data.dim() else data.reshape(1).view(torch.uint8).numpy().data
        )
