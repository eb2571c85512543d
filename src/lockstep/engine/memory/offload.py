"""The trainer's memory on the device, and its copies on the host while the server has the GPU.

Storages are emptied and refilled in place, so views, flat parameter buffers and gradient hooks stay
valid. Do not touch the tensors while they are offloaded. Nothing else may use the device's copy in
between. On a CPU this copies host memory; it exists for testing.

`benchmarks/colocated.py` measures the pinned copies and the freed memory on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.engine.parallel.device import CUDA, host_free
from lockstep.engine.state import TrainerState
from lockstep.errors import TrainerError


@dataclass
class _Held:
    """One storage of the device.

    `zeros`: it holds nothing between two verbs, so that it is not copied but cleared.
    `fixed`: nothing ever changes it, so that its copy on the host stays right.
    """

    name: str
    storage: torch.UntypedStorage
    device: torch.device
    nbytes: int
    zeros: bool
    fixed: bool
    host: Tensor | None = None
    """The copy, uint8; kept from cycle to cycle, since pinning memory is slow."""
    away: bool = False

    def bytes_N(self) -> Tensor:
        bytes_N = torch.empty(0, dtype=torch.uint8, device=self.device)
        return bytes_N.set_(self.storage, 0, (self.nbytes,), (1,))  # pyright: ignore[reportCallIssue, reportArgumentType]


class Offload:
    """Made once, when the model and the optimizer are complete; both keep their tensors for life."""

    def __init__(self, trainer: TrainerState) -> None:
        """Raises TrainerError for a tensor whose storage can't be emptied."""
        seen: dict[int, _Held] = {}
        self.buckets = trainer.optimizer.buckets
        self.optimizer = [storage for entry in _of_optimizer(trainer) if (storage := _held(*entry, False, seen))]
        self.weights = [
            storage
            for name, tensor, fixed in _of_model(trainer)
            if (storage := _held(name, tensor, False, fixed, seen))
        ]

    @property
    def state(self) -> str:
        """ "here"; "weights": the model is, the optimizer is not; "away"."""
        if any(storage.away for storage in self.weights):
            return "away"
        return "weights" if any(storage.away for storage in self.optimizer) else "here"

    def out(self, *, keep_weights: bool) -> int:
        """Empty the device of the optimizer's state and gradients and, unless `keep_weights`, of
        the model. Returns bytes freed.

        Raises TrainerError when the host has no room for the copies; nothing is moved then.
        """
        leaving = [storage for storage in self.optimizer + ([] if keep_weights else self.weights) if not storage.away]
        needed = sum(storage.nbytes for storage in leaving if storage.host is None and not storage.zeros)
        if needed > host_free():
            raise TrainerError(
                f"no room on this host for what leaves the GPU: {needed / 2**30:.2f} GiB needed, {host_free() / 2**30:.2f} GiB free; "
                "use offload = False, or a smaller model"
            )
        for storage in leaving:
            if storage.zeros or (storage.fixed and storage.host is not None):
                continue
            if storage.host is None:
                storage.host = torch.empty(storage.nbytes, dtype=torch.uint8, pin_memory=CUDA)
            storage.host.copy_(storage.bytes_N(), non_blocking=True)
        if CUDA:
            torch.cuda.synchronize()
        for storage in leaving:
            storage.storage.resize_(0)
            storage.away = True
        if CUDA:
            torch.cuda.empty_cache()
        return sum(storage.nbytes for storage in leaving)

    def back(self) -> int:
        """Everything to where it was, gradients cleared. Returns bytes taken.

        Raises TrainerError when the device has no room: something else uses it.
        """
        coming = [storage for storage in self.optimizer + self.weights if storage.away]
        for storage in coming:
            try:
                storage.storage.resize_(storage.nbytes)
            except torch.OutOfMemoryError as error:
                raise TrainerError(
                    f"the GPU has no room for what comes back to it ({storage.name}): is the server awake? {error}"
                ) from None
            _fill(storage)
            storage.away = False
        if CUDA:
            torch.cuda.synchronize()
        return sum(storage.nbytes for storage in coming)

    def on_host(self, bucket: int, kind: str) -> Tensor | None:
        """The optimizer's `kind` ("master", ...) of a bucket, from its copy on the host; None while
        the device has it.
        """
        state = next(storage for storage in self.optimizer if storage.name == _name(bucket, kind))
        if not state.away:
            return None
        assert state.host is not None
        return state.host.view(getattr(self.buckets[bucket], kind).dtype)

    def memory(self) -> dict[str, int]:
        """Bytes: of these storages on the device now, of their host copies, and what the device has
        free and in all.
        """
        storages = self.optimizer + self.weights
        free, total = torch.cuda.mem_get_info() if CUDA else (host_free(), 0)
        return {
            "device_storages": sum(storage.storage.nbytes() for storage in storages),
            "host_copies": sum(storage.host.numel() for storage in storages if storage.host is not None),
            "allocated": torch.cuda.memory_allocated() if CUDA else 0,
            "reserved": torch.cuda.memory_reserved() if CUDA else 0,
            "device_free": free,
            "device_total": total,
        }


def _fill(storage: _Held) -> None:
    bytes_N = storage.bytes_N()
    if storage.zeros:
        bytes_N.zero_()
        return
    assert storage.host is not None
    bytes_N.copy_(storage.host, non_blocking=True)


def _of_optimizer(trainer: TrainerState) -> Iterator[tuple[str, Tensor, bool]]:
    """Gradients are zero between two steps (`Optimizer.step` clears them, and so does whatever
    refuses a step).
    """
    for number, bucket in enumerate(trainer.optimizer.buckets):
        for kind in ("master", "exp_avg", "exp_avg_sq", "gradients"):
            yield _name(number, kind), getattr(bucket, kind), kind == "gradients"


def _name(bucket: int, kind: str) -> str:
    return f"{kind} of bucket {bucket}"


def _of_model(trainer: TrainerState) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is fixed: the base under adapters, which nothing is ever merged
    into).
    """
    for number, bucket in enumerate(trainer.optimizer.buckets):
        yield f"weights of bucket {number}", bucket.weights, False
    for name, parameter in trainer.model.named_parameters():
        yield name, parameter, not parameter.requires_grad
    for name, buffer in trainer.model.named_buffers():
        yield name, buffer, False


def _held(name: str, tensor: Tensor, zeros: bool, fixed: bool, seen: dict[int, _Held]) -> _Held | None:
    """The tensor's storage; None when it is empty or was found before."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0 or storage.data_ptr() in seen:
        return None
    if not storage.resizable():
        raise TrainerError(f"{name} can't leave the device: its memory belongs to something else")
    seen[storage.data_ptr()] = _Held(name, storage, tensor.device, storage.nbytes(), zeros, fixed)
    return seen[storage.data_ptr()]
