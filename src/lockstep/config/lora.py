"""Settings of adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from lockstep.config.base import Config

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM serves without padding."""


class LoraConfig(Config):
    """Low-rank adapters on the linear layers: W x + (alpha / rank) B A x, with `rslora` W x + (alpha
    / sqrt(rank)) B A x.
    """

    rank: int = Field(default=16, description=f"rank of A and B; one of {', '.join(map(str, SERVED_RANKS))}")
    alpha: float = Field(default=32, gt=0, description="scale: the delta is (alpha / rank) B A")
    rslora: bool = Field(
        default=False,
        description="divide alpha by the root of the rank, so that the updates of large ranks don't shrink (arXiv 2312.03732); "
        "folders hold the same adapter with lora_alpha = alpha x sqrt(rank)",
    )
    start_from: Path | None = Field(
        default=None,
        description="folder of a PEFT adapter for the same base model whose values step 0 has; rank, alpha and target_modules must be "
        "those of the adapter",
    )
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

    @property
    def applied_alpha(self) -> float:
        """The alpha of alpha / rank."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    def identity(self) -> dict[str, Any]:
        """What a run's adapter is, for the run's folder: without what has its default since later
        versions.
        """
        later = {"rslora", "start_from"} - self.model_fields_set
        return self.model_dump(mode="json", exclude=later)
