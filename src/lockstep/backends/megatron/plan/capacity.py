"""How much a server can hold: the tokens of its longest conversation, and the number of requests at
once. Both follow from the model's sizes and the free memory.

The estimates are for choosing defaults. vLLM measures for itself, and takes what its arguments
leave it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockstep.batching.pack import AUTO_ROW_LENGTH, MOST_ROW_LENGTH
from lockstep.models.activations import row_tokens
from lockstep.models.handler import tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lockstep.config.megatron import Parallel
    from lockstep.models.config import ModelConfig
    from lockstep.models.contract import Shard

GIB = 2**30
WIDTH = {"float32": 4, "bfloat16": 2, "float64": 8}
"""Bytes of an element."""
_BLOCK = 256
"""A default context is a multiple of this many tokens, which every block size of vLLM's divides."""
_PER_REQUEST = 512
"""Tokens of KV cache that a request must find when it begins; long ones wait for each other, as
vLLM arranges it.
"""
_LEAST_SLOTS, _CPU_SLOTS, _GPU_SLOTS, _LARGE_GPU_SLOTS = 4, 64, 256, 1024
_LARGE_GPU = 70 * GIB
"""vLLM's own limit: from here on it serves 1,024 sequences at once, and 256 below."""
_CPU_CACHE = (256 * 2**20, 4 * GIB)
"""Least and most bytes of KV cache on a CPU."""
_CPU_SHARE = 8
"""One part in so many of the free host memory is the KV cache's: trainer and weights need the rest.
"""
_TRAINER_OVERHEAD = 3 * GIB
"""Of a trainer: CUDA's context, logits by the chunk, buffers that the ranks share."""
_GPU_OVERHEAD = 3 * GIB
"""Of a GPU server: CUDA's context, activations while it reads prompts, CUDA graphs."""


@dataclass(frozen=True)
class Footprint:
    """Elements of a model.

    adapter: of one LoRA adapter, 0 without one.
    """

    parameters: int
    adapter: int

    @classmethod
    def of(cls, shards: Sequence[Shard], targets: Sequence[str], rank: int) -> Footprint:
        """shards: of the whole model.
        targets: the layers with an adapter of this rank.
        """
        parameters = sum(math.prod(shape) for shape in tensor_shapes(shards).values())
        sites = [site for shard in shards for site in shard.sites if site.target in targets]
        return cls(parameters, rank * sum(site.in_features + site.out_features for site in sites))


@dataclass(frozen=True)
class Capacity:
    """max_model_len: tokens of the longest conversation.
    slots: sequences served at once.
    cache: bytes of a CPU's KV cache; None on a GPU.
    cache_tokens: what the KV cache holds by this estimate; None where the GPU's memory is not
        known.
    limit: what bounds the length.
    """

    max_model_len: int
    slots: int
    cache: int | None
    cache_tokens: int | None
    limit: str


def bytes_per_token(config: ModelConfig, dtype: str, ranks: int) -> int:
    """KV cache of one token on each of the server's `ranks`."""
    attention = sum(kind == "full_attention" for kind in config.layer_types)
    return 2 * attention * -(-config.kv_heads // ranks) * config.head_dim * WIDTH[dtype]


def bytes_per_sequence(config: ModelConfig, dtype: str, ranks: int) -> int:
    """State of GatedDeltaNet layers on each rank, which does not grow with the sequence."""
    linear = sum(kind == "linear_attention" for kind in config.layer_types)
    state = config.linear_value_heads * config.linear_key_dim * config.linear_value_dim * 4
    rows = 2 * config.linear_key_heads * config.linear_key_dim + config.linear_value_heads * config.linear_value_dim
    return linear * (state + rows * config.conv_kernel * WIDTH[dtype]) // ranks


def on_cpu(config: ModelConfig, dtype: str, free: int, asked_length: int | None, asked_slots: int | None) -> Capacity:
    """free: bytes of host memory. asked_*: what the user fixed."""
    least, most = _CPU_CACHE
    cache = min(max(free // _CPU_SHARE, least), most)
    capacity = _capacity(config, dtype, 1, cache, _CPU_SLOTS, asked_length, asked_slots)
    token, sequence = bytes_per_token(config, dtype, 1), bytes_per_sequence(config, dtype, 1)
    full = capacity.slots * (token * (capacity.max_model_len + _BLOCK) + 2 * sequence)
    # A length that the user asked for is given room as well.
    sequence_bytes = token * (capacity.max_model_len + 2 * _BLOCK) + 4 * sequence
    cache = max(min(cache, max(full, least)), sequence_bytes)
    return Capacity(
        capacity.max_model_len, capacity.slots, cache, max(cache - 2 * sequence, 0) // token, capacity.limit
    )


def on_gpu(
    config: ModelConfig,
    dtype: str,
    budget: int | None,
    large: bool,
    ranks: int,
    weights: int,
    asked_length: int | None,
    asked_slots: int | None,
) -> Capacity:
    """budget: bytes that the server takes of each of its `ranks` GPUs; None where nobody knows.
    weights: bytes of model and adapters on each.
    large: vLLM counts the GPU among the large ones.
    """
    most = _LARGE_GPU_SLOTS if large else _GPU_SLOTS
    if budget is None:
        return Capacity(asked_length or config.max_positions, asked_slots or most, None, None, "the model's positions")
    logits = 4 * 4 * (asked_slots or most) * config.vocab_size
    cache = max(budget - weights - logits - _GPU_OVERHEAD, 0)
    return _capacity(config, dtype, ranks, cache, most, asked_length, asked_slots)


def row_limit(config: ModelConfig, width: int, parallel: Parallel, free: int | None) -> int:
    """The number of tokens a packed row may hold, so that a trainer rank's activations fit into
    `free` bytes. None: unknown.
    """
    if free is None:
        return MOST_ROW_LENGTH
    fits = row_tokens(config, width, parallel.tensor, free - _TRAINER_OVERHEAD) * parallel.context
    return max(AUTO_ROW_LENGTH, min(MOST_ROW_LENGTH, fits // _BLOCK * _BLOCK))


def is_large(total: int) -> bool:
    return total >= _LARGE_GPU


def _capacity(
    config: ModelConfig,
    dtype: str,
    ranks: int,
    cache: int,
    most: int,
    asked_length: int | None,
    asked_slots: int | None,
) -> Capacity:
    token, sequence = bytes_per_token(config, dtype, ranks), bytes_per_sequence(config, dtype, ranks)
    tokens = max(cache - 2 * sequence, 0) // token
    fits = int(0.9 * tokens) // _BLOCK * _BLOCK
    length, limit = min((config.max_positions, "the model's positions"), (fits, "what the KV cache holds"))
    slots = min(most, max(_LEAST_SLOTS, cache // (token * min(_PER_REQUEST, max(length, 1)) + sequence)))
    return Capacity(asked_length or length, asked_slots or slots, None, tokens, limit)
