"""The optimizer's state on disk: `master/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>` by Hugging
Face or adapter tensor name.

Independent of the parallel layout: written at one, read at any other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lockstep.engine.optim.optimizer import Bucket, Optimizer
from lockstep.engine.optim.state_file import StateFile, create, rectangles
from lockstep.engine.parallel.broadcast import broadcast_json
from lockstep.errors import StoreError, WeightsError

KINDS = ("master", "exp_avg", "exp_avg_sq")
FILE = "optimizer.safetensors"


def _owns(bucket: Bucket) -> bool:
    """Ranks that hold equal copies leave the writing to the one that counts them."""
    return bucket.counted


OnHost = Callable[[int, str], torch.Tensor | None]
"""(number of a bucket, kind) to that part of the state on the host, where the device does not have
it (`offload.py`); else None.
"""


def write_state(
    optimizer: Optimizer, folder: Path, shapes: Mapping[str, Sequence[int]], on_host: OnHost | None = None
) -> None:
    """Write the state of all ranks to `folder/optimizer.safetensors`, which must not exist.
    Collective; returns on all ranks together.

    Raises StoreError, on every rank, where the disk has no room.

    shapes: of every Hugging Face (or adapter) tensor that is trained anywhere.
    on_host: None when nothing was moved off the device.
    """
    path = folder / FILE
    wide = "F64" if any(b.master.dtype == torch.float64 for b in optimizer.buckets) else "F32"
    failure: dict[str, str] = {}
    if dist.get_rank() == 0:
        everything = {f"{kind}/{name}": shape for kind in KINDS for name, shape in shapes.items()}
        try:
            create(path, everything, wide, {"count": str(optimizer.count), "format": "lockstep-optimizer-1"})
        except StoreError as error:
            failure = {"error": str(error)}
    assert dist.group.WORLD is not None
    if failure := broadcast_json(failure, 0, dist.group.WORLD):
        raise StoreError(failure["error"])
    file = StateFile(path, writable=True)
    for number, bucket in enumerate(optimizer.buckets):
        if _owns(bucket):
            for kind in KINDS:
                away = None if on_host is None else on_host(number, kind)
                # A copy also on a CPU: a storage that NumPy has seen can never be emptied again
                # (offload.py).
                values = getattr(bucket, kind).to("cpu", copy=True) if away is None else away
                _exchange(file, bucket, kind, values.numpy(), write=True)
    file.close()
    dist.barrier()


def read_state(optimizer: Optimizer, folder: Path) -> None:
    """Read masters and moments, and put the masters into the model. Raises WeightsError when
    anything is missing or misshapen.
    """
    file = StateFile(folder / FILE)
    count = file.metadata().get("count")
    if count is None or not count.isdigit():
        raise WeightsError(f"{folder / FILE} has no update count; it was not written by this version")
    wide = {torch.float32: np.float32, torch.float64: np.float64}
    values = {kind: [np.zeros(len(b.master), wide[b.master.dtype]) for b in optimizer.buckets] for kind in KINDS}
    for index, bucket in enumerate(optimizer.buckets):
        for kind in KINDS:
            _exchange(file, bucket, kind, values[kind][index], write=False)
    file.close()
    # Nothing is changed before everything was read.
    for index, bucket in enumerate(optimizer.buckets):
        for kind in KINDS:
            getattr(bucket, kind).copy_(torch.from_numpy(values[kind][index]))
    optimizer.count = int(count)
    optimizer.restore_weights()


def _exchange(file: StateFile, bucket: Bucket, kind: str, values: np.ndarray, write: bool) -> None:
    for trainable, first, last, where in bucket.slices():
        part = values[where]
        for box in rectangles(trainable, first, last):
            place = file.part(box, f"{kind}/", trainable.shapes[box.name])
            if write:
                place[...] = part[box.first : box.last].reshape(place.shape)
            else:
                part[box.first : box.last] = place.reshape(-1)
