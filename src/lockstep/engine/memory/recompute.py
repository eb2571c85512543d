"""Which layers recompute their activations in the backward pass: as few as memory allows, decided for each batch.

Recomputing every layer costs a second forward pass, a third of the work of a LoRA step. Layers near the output are the ones that keep
their activations: the backward pass frees them first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lockstep.engine.layers.lm_head import CHUNK_BYTES
from lockstep.engine.parallel.device import CUDA, device
from lockstep.engine.state import TrainerState
from lockstep.models.config import ModelConfig

MARGIN = 1.4
"""Estimates are multiplied by this: temporaries, and memory the allocator can't use."""
_STATE_CHUNK = 64
"""Tokens per chunk of the GatedDeltaNet kernels; they keep one state per chunk."""


def kept_elements(config: ModelConfig, layer: int, tensor: int) -> int:
    """Elements per token that the backward pass of layer `layer` needs on one of `tensor` ranks when nothing is recomputed."""
    stream = 6 * config.hidden_size
    if config.layer_types[layer] == "linear_attention":
        keys, values = (
            config.linear_key_heads * config.linear_key_dim,
            config.linear_value_heads * config.linear_value_dim,
        )
        states = config.linear_value_heads * config.linear_key_dim * config.linear_value_dim // _STATE_CHUNK
        mixer = 4 * (2 * keys + 2 * values) + 2 * states
    else:
        queries = config.heads * config.head_dim
        mixer = 3 * (queries * (2 if config.output_gate else 1) + 2 * config.kv_heads * config.head_dim) + 2 * queries
    if config.moe_layers[layer]:
        mlp = (
            config.experts_per_token * (4 * config.expert_size + 3 * config.hidden_size) + 4 * config.shared_expert_size
        )
    else:
        mlp = 4 * config.mlp_size
    return stream + (mixer + mlp) // tensor


def layers_that_fit(bytes_per_layer: list[int], available: int) -> int:
    """How many of the last layers may keep their activations in `available` bytes, one more layer's being recomputed meanwhile."""
    spare = available - max(bytes_per_layer)
    count = 0
    for size in reversed(bytes_per_layer):
        spare -= size
        if spare < 0:
            break
        count += 1
    return count


def _available() -> int:
    """Bytes that new tensors may take, on the rank that has least."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    least = torch.tensor(free, dtype=torch.int64, device=device())
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def plan(trainer: TrainerState, tokens: int) -> int:
    """Set each layer's `recompute` for rows of up to `tokens` tokens; returns how many layers recompute.

    A fixed setting (`Settings.recompute`) stays as it is. Several pipeline stages hold many rows at once and always recompute, and so
    do all ranks alike: a layer that ran its collectives again on one rank alone would hang the others.
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
