"""The direct path of a weight sync: every sender slice copied to its slice of a live parameter, in one call.

The plan is not written by hand per model. vLLM's own `load_weights` runs once while every copy into a live parameter is
recorded; from then on a sync repeats those copies from the same staging buffers, without a line of Python per tensor.
Same copies, same bytes, whatever the family, and whatever slice of a tensor this worker holds.

It holds only where a parameter stays as `load_weights` leaves it. A server that packs or permutes weights after loading
them (linear layers on a CPU, some expert kernels) needs the other path, and says so when the plan is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_CONSTANTS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


class DirectUnavailableError(ValueError):
    """This model's weights can't be copied in place; the message says which and why."""


class DirectPlan:
    """Pairs of views: where to, where from. Valid as long as the parameters and the buffers live where they did."""

    def __init__(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        self._targets = targets
        self._sources = sources

    def __len__(self) -> int:
        return len(self._targets)

    @torch.no_grad()
    def copy(self) -> None:
        """Copies what the buffers hold now into the live parameters."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)


def make_plan(
    parameters: Mapping[str, torch.Tensor], buffers: Iterable[torch.Tensor], load: Callable[[], object]
) -> DirectPlan:
    """Runs `load` once, which loads from views of `buffers` into `parameters`, and returns the plan to repeat it.

    parameters: the live ones, by name; two names of one tensor count once. buffers: the staging buckets. Raises
    DirectUnavailableError when a parameter is filled from anything but the buffers, or not exactly once.
    """
    recorder = _Recorder(parameters, buffers)
    with torch.no_grad(), recorder:
        load()
    recorder.check()
    return DirectPlan(recorder.targets, recorder.sources)


class _Recorder(TorchDispatchMode):
    """Notes every copy whose target lies in a live parameter."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], buffers: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.targets: list[torch.Tensor] = []
        self.sources: list[torch.Tensor] = []
        self._live: dict[int, str] = {}
        self._sizes: dict[str, int] = {}
        for name, parameter in parameters.items():
            if parameter.numel() == 0:
                raise DirectUnavailableError(f"{name!r} is packed away after loading: use the load_weights path")
            if _storage(parameter) not in self._live:
                self._live[_storage(parameter)] = name
                self._sizes[name] = parameter.numel()
        self._staged = {_storage(buffer) for buffer in buffers}
        self._filled = dict.fromkeys(self._sizes, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func._schema.is_mutable and isinstance(args[0] if args else None, torch.Tensor):
            name = self._live.get(_storage(args[0]))
            if name is not None:
                self._note(name, func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, func: Any, args: tuple[Any, ...]) -> None:
        if func in _CONSTANTS:  # padding: it stays as it is, but a parameter filled and then written counts too often
            self._filled[name] += args[0].numel()
            return
        if func is not torch.ops.aten.copy_.default or _storage(args[1]) not in self._staged:
            raise DirectUnavailableError(f"{name!r} is computed while it is loaded ({func}): use the load_weights path")
        # Detached views of the same memory, so that repeating the copy meets no autograd and no parameter subclass.
        self.targets.append(args[0].detach())
        self.sources.append(args[1].detach().expand(args[0].shape))
        self._filled[name] += args[0].numel()

    def check(self) -> None:
        """Every element of every parameter was written exactly once (as counted)."""
        for name, size in self._sizes.items():
            if self._filled[name] != size:
                raise DirectUnavailableError(
                    f"{name!r} has {size} elements and {self._filled[name]} were loaded: use the load_weights path"
                )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
