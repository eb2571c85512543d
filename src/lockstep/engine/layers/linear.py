"""Megatron's parallel linear layers with a place for an adapter. Injected through the layer spec,
so names stay Megatron's.

Shapes: S sequence (of this rank under sequence parallelism), I input features, O output features of
this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from lockstep.engine.layers.lora import ColumnAdapter, Part, RowAdapter


class ColumnLinear(ColumnParallelLinear):
    """Output rows split over TP. `adapter(x_SI, y_SO) -> y_SO` adds its part when one is attached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: nn.Module | None = None

    def make_adapter(self, parts: Sequence[Part], rank: int, scale: float) -> ColumnAdapter:
        return ColumnAdapter(self, parts, rank, scale)

    def forward(self, input_: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:  # pyright: ignore
        y_SO, bias = super().forward(input_, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        return (y_SO if self.adapter is None else self.adapter(input_, y_SO)), bias


class RowLinear(RowParallelLinear):
    """Input columns split over TP, outputs summed over it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: nn.Module | None = None

    def make_adapter(self, parts: Sequence[Part], rank: int, scale: float) -> RowAdapter:
        return RowAdapter(self, parts, rank, scale)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:  # pyright: ignore
        y_SO, bias = super().forward(input_)
        return (y_SO if self.adapter is None else self.adapter(input_, y_SO)), bias
