"""Parts of the model that a GPU runs better compiled: pure functions, written once, called plain or
through torch.compile.

Which regions are compiled is the family's policy (`handler.compile.regions`), switched on per
process by `enable`. A region never contains a collective or a module: only tensors and numbers go
in, so one compiled version serves all layers.

One compiled version also serves all row lengths. The first dim of each tensor, its tokens, is
marked dynamic; the others are constants of the kernels. A run compiles in its first step and never
again. On an H100 such kernels take the time of kernels for one length (`benchmarks/README.md`).

Shapes: S tokens, ... any dims between, D last dim.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.callback import callback_handler
from torch.fx.experimental import _config as shapes_config

from lockstep.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

_VARIANTS = 64
"""Versions of one function: a few shapes (stream, heads), trained and scored, in each dtype."""
_NAMES: set[str] = set()
_ENABLED: set[str] = set()


def enable(names: Iterable[str]) -> None:
    """Compile exactly these regions from now on. Raises ConfigError for one that does not exist."""
    chosen = set(names)
    if chosen - _NAMES:
        raise ConfigError(f"unknown compile region {sorted(chosen - _NAMES)[0]!r}; known: {', '.join(sorted(_NAMES))}")
    _ENABLED.clear()
    _ENABLED.update(chosen)
    # Past its limits, 8 and 256 by default, torch would run a function uncompiled and say nothing.
    torch._dynamo.config.recompile_limit = _VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = _VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Else two dims that are equal by chance in the first row would have to stay equal, or cost
    # another version.
    shapes_config.use_duck_shape = False


def region(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function part of a region."""
    _NAMES.add(name)

    def decorate(plain: Callable[P, R]) -> Callable[P, R]:
        compiled = functools.cache(lambda: torch.compile(plain, dynamic=False))

        @functools.wraps(plain)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if name not in _ENABLED:
                return plain(*args, **kwargs)
            for value in args:
                if isinstance(value, Tensor) and value.ndim > 1:
                    torch._dynamo.mark_dynamic(value, 0)
            return compiled()(*args, **kwargs)

        return call

    return decorate


@dataclass(frozen=True)
class Compiled:
    """The number of compilations in this process, and the seconds that the process waited for them."""

    count: int
    seconds: float


class CompileClock:
    """Listens to torch's compiler, whichever pass asks for it."""

    def __init__(self) -> None:
        self.compiled, self._started = Compiled(0, 0.0), 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def _start(self, _what: object) -> None:
        self._started = time.perf_counter()

    def _end(self, _what: object) -> None:
        seconds = self.compiled.seconds + time.perf_counter() - self._started
        self.compiled = Compiled(self.compiled.count + 1, seconds)


@functools.cache
def compile_clock() -> CompileClock:
    """This process's clock, which runs from the first call on."""
    return CompileClock()


def wide(x: Tensor) -> Tensor:
    """At least fp32: where rounding to bf16 would show, and without narrowing fp64 in exactness
    tests.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


@region("norm")
def rms_norm(x: Tensor, weight_D: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """`x / rms(x) * w` (or `* (1 + w)`), computed in fp32 and rounded once."""
    scale_D = wide(weight_D) + 1.0 if zero_centered else wide(weight_D)
    return F.rms_norm(wide(x), scale_D.shape, scale_D, eps).to(x.dtype)


@region("norm")
def gated_rms_norm(x: Tensor, weight_D: Tensor, gate: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) * w * silu(gate)`."""
    return (F.rms_norm(wide(x), weight_D.shape, wide(weight_D), eps) * F.silu(wide(gate))).to(x.dtype)


@region("attention")
def rotate(x_SND: Tensor, cos_S1D: Tensor, sin_S1D: Tensor) -> Tensor:
    """Rotary embedding of the first dims (as many as the angles have; the rest pass through),
    halves layout, in fp32.
    """
    dims = cos_S1D.shape[-1]
    part, rest = wide(x_SND[..., :dims]), x_SND[..., dims:]
    first, second = part.chunk(2, -1)
    turned = (part * cos_S1D + torch.cat((-second, first), -1) * sin_S1D).to(x_SND.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


@region("attention")
def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """`x * sigmoid(gate)` in fp32, rounded once."""
    return (wide(x) * wide(gate).sigmoid()).to(x.dtype)


@region("mlp")
def gated_silu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2F]`, in fp32, rounded once."""
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(wide(gate)) * wide(up)).to(gate_up.dtype)
