"""A random adapter, large enough to change a model's answers clearly. Imports torch, so a program
with an event loop calls it in a thread or a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lockstep.models.checkpoint.peft import AdapterInfo, identity_adapter, write_adapter
from lockstep.models.checkpoint.read import open_checkpoint
from lockstep.models.registry import get_model_support_handler, get_model_support_spec, load_model_config
from lockstep.models.targets import check_targets, lora_sites

RANK, ALPHA = 8, 16.0
_STRENGTH = 0.1
"""Standard deviation of (alpha / rank) B A's entries, relative to a fan-in scaled matrix: a few
tenths of a nat.
"""


def write_random_adapter(
    base: Path, folder: Path, seed: int, dtype: str, only: Sequence[str] | None = None, strength: float = _STRENGTH
) -> Path:
    """Write a PEFT folder on the family's default targets, A as PEFT starts it and B random, in the
    model's dtype.

    only: targets whose B is not 0; None: all.
    """
    handler, config = get_model_support_handler(str(base)), load_model_config(str(base))
    checkpoint = open_checkpoint(base, handler, config)
    shards = handler.all_shards(config, checkpoint.layout)
    targets = check_targets(get_model_support_spec(str(base)), shards, None)
    sites = lora_sites(shards, targets)
    kind: torch.dtype = getattr(torch, dtype)
    tensors = identity_adapter(sites, RANK, seed, kind)
    generator = torch.Generator().manual_seed(seed)
    for site in (site for site in sites if only is None or site.target in only):
        name = f"{site.module}.lora_B"
        scale = strength * (3 / RANK) ** 0.5 * RANK / ALPHA  # A's entries have variance 1 / (3 fan-in)
        tensors[name] = (torch.randn(tensors[name].shape, generator=generator) * scale).to(kind)
    return write_adapter(folder, tensors, AdapterInfo(str(base), RANK, ALPHA, targets), config, checkpoint.layout)
