"""Counted work of a training step: floating-point operations and bytes of one trainer rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockstep.backends.megatron.plan.capacity import Footprint
from lockstep.cli.plan.ceilings import (
    KEPT_ATTENTION,
    KEPT_EXPERTS,
    KEPT_LINEAR,
    KEPT_STREAM,
    LAUNCH_S,
    LOGITS_BYTES,
    LOGITS_CHUNK,
    TRAINED_BYTES,
    USED_FLOPS,
    Device,
)
from lockstep.models.activations import MARGIN, kept_elements, layers_that_fit, mixer_elements, mlp_elements
from lockstep.models.contract import Layout
from lockstep.models.handler import tensor_shapes
from lockstep.models.registry import get_model_support_handler_for_spec

if TYPE_CHECKING:
    from lockstep.models.config import ModelConfig
    from lockstep.models.spec import ModelSupportSpec

WIDTH = 2
"""Bytes of a bf16 element."""


@dataclass(frozen=True)
class Model:
    """A model's sizes. Elements, not bytes.

    experts: parameters of routed experts, among `parameters`.
    active: parameters that multiply each token; of a mixture's experts those that it chooses.
    adapter: of the LoRA adapter.
    expert_adapter: the experts' part of it.
    """

    config: ModelConfig
    parameters: int
    experts: int
    active: int
    adapter: int
    expert_adapter: int

    @classmethod
    def of(cls, config: ModelConfig, spec: ModelSupportSpec, rank: int) -> Model:
        """rank: of the adapter."""
        shards = get_model_support_handler_for_spec(spec).all_shards(config, Layout())
        targets = spec.default_target_modules
        footprint = Footprint.of(shards, targets, rank)
        routed = [shard for shard in shards if any(".experts." in name for name in tensor_shapes([shard]))]
        sizes = {name: math.prod(shape) for name, shape in tensor_shapes(shards).items()}
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        chosen = experts * config.experts_per_token // max(config.experts, 1)
        looked_up = 0 if config.tied else config.vocab_size * config.hidden_size
        active = footprint.parameters - experts + chosen - looked_up
        return cls(
            config,
            footprint.parameters,
            experts,
            active,
            footprint.adapter,
            Footprint.of(routed, targets, rank).adapter,
        )

    @property
    def dense_attention(self) -> bool:
        """No experts, and attention in all layers: what the measured shares are of."""
        return not self.config.is_moe and set(self.config.layer_types) == {"full_attention"}


@dataclass(frozen=True)
class Step:
    """The work of one step.

    tokens: computed, each once. row: tokens of the longest row. rows: of the batch.
    context: tokens that a token attends to, on average.
    """

    tokens: int
    row: int
    rows: int
    context: float


@dataclass(frozen=True)
class Ranks:
    """Sizes of the trainer's parallelism."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True)
class Memory:
    """Bytes of a trainer rank at its peak, and the layers that compute their activations again."""

    peak: int
    recomputed: int


def memory(model: Model, step: Step, ranks: Ranks, room: int) -> Memory:
    """As few layers as `room` bytes ask for recompute their activations. `peak` may exceed `room`: the
    step does not fit then.
    """
    config, tensor = model.config, ranks.tensor
    layers = -(-config.layers // ranks.pipeline)

    def here(all_of_it: int, experts: int) -> float:
        return ((all_of_it - experts) / tensor + experts / ranks.expert) / ranks.pipeline

    fixed = WIDTH * here(model.parameters, model.experts) + LOGITS_BYTES * config.vocab_size / tensor
    fixed += TRAINED_BYTES * here(model.adapter, model.expert_adapter)
    width = WIDTH * step.row
    kept = width * sum(_kept(config, layer, ranks) for layer in range(config.layers)) / config.layers
    if ranks.pipeline > 1:  # several rows wait for their backward pass, and every layer computes again
        rows = min(ranks.pipeline, step.rows)
        return Memory(int(fixed + rows * layers * config.hidden_size * width + kept), layers)
    sizes = [int(MARGIN * width * kept_elements(config, layer, tensor)) for layer in range(config.layers)]
    head = 3 * LOGITS_CHUNK + 4 * config.hidden_size * width
    recomputed = layers - layers_that_fit(sizes, int(room - fixed) - head)
    inputs = recomputed * config.hidden_size * width
    return Memory(int(fixed + (layers - recomputed) * kept + inputs + (kept if recomputed else 0)), recomputed)


def _kept(config: ModelConfig, layer: int, ranks: Ranks) -> float:
    """Elements per token that the backward pass of a layer finds on a rank, as it was measured."""
    tensor = ranks.tensor
    mixer, mlp = mixer_elements(config, layer), mlp_elements(config, layer)
    stream = KEPT_STREAM * 6 * config.hidden_size / (tensor if ranks.sequence else 1)
    linear = config.layer_types[layer] == "linear_attention"
    mixed = (KEPT_LINEAR if linear else KEPT_ATTENTION) * mixer / tensor
    if config.moe_layers[layer]:
        return stream + mixed + KEPT_EXPERTS * mlp / tensor  # each tensor rank sends its part of the tokens
    return stream + mixed + KEPT_STREAM * mlp / tensor


def flops(model: Model, step: Step, recomputed_share: float) -> float:
    """Of a whole step. A frozen weight takes two operations per token forward and two backward, a
    trained one four backward.
    """
    config = model.config
    attention = sum(kind == "full_attention" for kind in config.layer_types)
    linear = (4 + 2 * recomputed_share) * model.active + 6 * model.adapter
    scores = (3.5 + recomputed_share) * 4 * config.heads * config.head_dim * step.context * attention
    return step.tokens * (linear + scores)


def seconds(
    model: Model, step: Step, ranks: Ranks, recomputed: int, device: Device, network: float | None = None
) -> float | None:
    """Of one step; None where nothing like it was measured: mixtures, linear attention, and models
    so small that kernels wait for their launch.

    network: bytes per second between hosts, where the trainer's ranks are on several.
    """
    config = model.config
    if not model.dense_attention:
        return None
    layers = -(-config.layers // ranks.pipeline)
    rows = -(-step.rows // ranks.data)
    work = flops(model, step, recomputed / layers) * rows / step.rows / (ranks.tensor * ranks.pipeline)
    computing = work / (USED_FLOPS * device.flops)
    if computing / (rows * layers) < LAUNCH_S:
        return None
    bubble = 1 + (ranks.pipeline - 1) / rows
    # Two sums over the tensor ranks forward and two backward.
    summed = 4 * layers * rows * step.row * config.hidden_size * WIDTH
    gradients = 4 * model.adapter / (ranks.tensor * ranks.pipeline)
    return (
        computing * bubble
        + _sum_s(summed, ranks.tensor, device.link)
        + _sum_s(gradients, ranks.data, network or device.link)
    )


def _sum_s(nbytes: float, ranks: int, link: float) -> float:
    """Seconds of a sum over ranks: each sends every byte twice, but for its own part."""
    return 2 * nbytes * (ranks - 1) / ranks / link
