"""Which GPUs of this machine train and which serve."""

from __future__ import annotations

from pathlib import Path

from lockstep.config import Placement, unsupported
from lockstep.errors import ConfigError


def resolve_placement(placement: Placement | None) -> Placement | None:
    """The given placement; else GPU 0 and 1, or None (CPU) without a GPU. Raises ConfigError for what this machine lacks."""
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if placement is None and count == 1:
        raise ConfigError(
            "one GPU: trainer and server need one each for now; set placement, or hide the GPU to run on the CPU"
        )
    if placement is None:
        return Placement(trainer=(0,), inference=(1,)) if count else None
    if placement.shared:
        raise unsupported(
            "placement", placement, "MegatronBackend", "trainer and server need GPUs of their own for now"
        )
    wanted = max(*placement.trainer, *placement.inference)
    if wanted >= count:
        raise ConfigError(
            f"placement names GPU {wanted}, this machine has {count}: choose from 0 to {count - 1}"
            if count
            else "placement names GPUs, this machine has none: leave placement out to run on the CPU"
        )
    return placement
