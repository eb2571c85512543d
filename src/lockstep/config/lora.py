"""Settings of adapters."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from lockstep.config.base import Config

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM serves without padding."""


class LoraConfig(Config):
    """Low-rank adapters on the linear layers: W x + (alpha / rank) B A x."""

    rank: int = Field(default=16, description=f"rank of A and B; one of {', '.join(map(str, SERVED_RANKS))}")
    alpha: float = Field(default=32, gt=0, description="scale: the delta is (alpha / rank) B A")
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="names of the linear layers to adapt, such as q_proj; None or all-linear: every linear layer of the family",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _every_layer(cls, targets: Any) -> Any:
        return None if targets in ("all-linear", ["all-linear"], ("all-linear",)) else targets

    @field_validator("rank")
    @classmethod
    def _served(cls, rank: int) -> int:
        if rank not in SERVED_RANKS:
            raise ValueError(f"must be one of {', '.join(map(str, SERVED_RANKS))} (what vLLM serves)")
        return rank

    @field_validator("target_modules")
    @classmethod
    def _some_targets(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets is not None and (not targets or len(set(targets)) != len(targets)):
            raise ValueError("must name at least one layer, each once; leave it out for the family's default")
        return targets
