"""The layers that recompute their activations in the backward pass: as few as memory allows,
decided for each batch.

Recomputing every layer costs a second forward pass, a third of the work of a LoRA step. Layers near
the output are the ones that keep their activations: the backward pass frees them first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lockstep.engine.layers.lm_head import CHUNK_BYTES
from lockstep.engine.parallel.device import CUDA, device
from lockstep.engine.state import TrainerState
from lockstep.models.activations import MARGIN, kept_elements, layers_that_fit


def _available() -> int:
    """Bytes that new tensors may take, on the rank that has least."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    least = torch.tensor(free, dtype=torch.int64, device=device())
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def plan(trainer: TrainerState, tokens: int) -> int:
    """Set each layer's `recompute` for rows of up to `tokens` tokens; returns how many layers
    recompute.

    A fixed setting (`Settings.recompute`) stays as it is. Several pipeline stages hold many rows at
    once and always recompute. All ranks decide alike: a layer that ran its collectives again on one
    rank alone would hang the others.
    """
    layers: list[Any] = list(trainer.model.decoder.layers)
    if trainer.settings.recompute is not None or not CUDA:
        return sum(bool(layer.recompute) for layer in layers)
    keep = 0
    tokens = -(-tokens // trainer.parallel.context)
    if trainer.parallel.pipeline == 1:
        width, tensor = trainer.dtype.itemsize, trainer.parallel.tensor
        sizes = [
            int(MARGIN * tokens * width * kept_elements(trainer.config, n, tensor))
            for n in range(trainer.config.layers)
        ]
        head = 3 * CHUNK_BYTES + 4 * tokens * trainer.config.hidden_size * width
        keep = layers_that_fit(sizes, _available() - head)
    for number, layer in enumerate(layers):
        layer.recompute = number < len(layers) - keep
    return len(layers) - keep
