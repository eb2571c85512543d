"""Faults in a live trainer's model, gradients, updates and rows.

Each takes the trainer, whose weights its bench brings back afterwards.

Shapes: E experts, F expert width, H hidden, S row tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lockstep.engine.layers.lora import ExpertAdapter, _Adapter
from lockstep.engine.layers.moe import MoE
from lockstep.engine.layers.norm import RMSNorm
from lockstep.engine.layers.router import Router
from lockstep.engine.model import inverse_frequencies
from lockstep.engine.rows.packed_row import Nodes, PackedRow
from lockstep.engine.state import TrainerState
from lockstep.models.config import ModelConfig
from lockstep.validate.faults.fault import Fault, hybrid, moe, replaced

PARITY, PACKING = "hf_parity", "packing_invariance"


def _modules(trainer: TrainerState, kind: type[Any] | tuple[type[Any], ...]) -> list[Any]:
    return [module for module in trainer.model.modules() if isinstance(module, kind)]


def _on_all(kind: type[Any] | tuple[type[Any], ...], name: str, change: Callable[[Any], Any]) -> Any:
    """A plant that replaces an attribute of every module of a kind."""

    @contextmanager
    def plant(trainer: TrainerState) -> Iterator[None]:
        with ExitStack() as stack:
            for module in _modules(trainer, kind):
                stack.enter_context(replaced(module, name, change(getattr(module, name))))
            yield

    return plant


@contextmanager
def rope_theta(trainer: TrainerState) -> Iterator[None]:
    wrong = replace(trainer.config.rope, theta=trainer.config.rope.theta * 1.1)
    with replaced(trainer.model, "_inverse_D", inverse_frequencies(wrong)):
        yield


@contextmanager
def layer_skipped(trainer: TrainerState) -> Iterator[None]:
    layer: Any = trainer.model.decoder.layers[-1]
    with replaced(layer, "_run", lambda x_S1H, _row, _angles: x_S1H):
        yield


@contextmanager
def rows_swapped(trainer: TrainerState) -> Iterator[None]:
    """Query and gate rows where there is an output gate; else those of two query heads."""
    config = trainer.config
    layer = next(n for n, kind in enumerate(config.layer_types) if kind == "full_attention")
    attention: Any = trainer.model.decoder.layers[layer].self_attention
    weight = attention.linear_qkv.weight.data
    count = config.heads // config.kv_heads * config.head_dim if config.output_gate else config.head_dim
    first, second = weight[:count].clone(), weight[count : 2 * count].clone()
    weight[:count], weight[count : 2 * count] = second, first
    yield


@contextmanager
def expert_transposed(trainer: TrainerState) -> Iterator[None]:
    w2_EHF = _modules(trainer, MoE)[0].experts.w2.data
    w2_EHF[1] = w2_EHF[1].T.contiguous().view(w2_EHF.shape[1:])
    yield


@contextmanager
def sum_as_mean(trainer: TrainerState) -> Iterator[None]:
    honest = trainer.optimizer.reduce

    def reduce() -> float:
        for bucket in trainer.optimizer.buckets:
            bucket.gradients.mul_(0.5)
        return honest()

    with replaced(trainer.optimizer, "reduce", reduce):
        yield


@contextmanager
def gradient_lost(trainer: TrainerState) -> Iterator[None]:
    """The gradient of one vector of one layer."""
    honest = trainer.optimizer.reduce
    parameters = [(bucket, *part) for bucket in trainer.optimizer.buckets for part in bucket.slices()]
    bucket, _, _, _, place = min(parameters, key=lambda part: part[3] - part[2])

    def reduce() -> float:
        bucket.gradients[bucket.low : bucket.high][place] = 0
        return honest()

    with replaced(trainer.optimizer, "reduce", reduce):
        yield


@contextmanager
def norms_decay(trainer: TrainerState) -> Iterator[None]:
    with ExitStack() as stack:
        for bucket in trainer.optimizer.buckets:
            stack.enter_context(replaced(bucket, "decays", True))
        yield


@contextmanager
def lora_scale_twice(trainer: TrainerState) -> Iterator[None]:
    with ExitStack() as stack:
        for adapter in _modules(trainer, (_Adapter, ExpertAdapter)):
            stack.enter_context(replaced(adapter, "scale", adapter.scale**2))
        yield


def _rows(change: Callable[[PackedRow], PackedRow]) -> Any:
    """A plant that changes each row before the model sees it."""

    @contextmanager
    def plant(trainer: TrainerState) -> Iterator[None]:
        honest = trainer.model.forward_row

        def forward_row(row: PackedRow, received: torch.Tensor | None = None) -> torch.Tensor:
            return honest(change(row), received)

        with replaced(trainer.model, "forward_row", forward_row):
            yield

    return plant


def _positions_off(row: PackedRow) -> PackedRow:
    later_S = torch.arange(row.length, device=row.positions_S.device) >= int(row.nodes.stop_M[0])
    return replace(row, positions_S=row.positions_S + later_S.long(), _cache={})


def _chained(row: PackedRow) -> Nodes:
    """Every node continues the one before it."""
    return replace(row.nodes, parent_M=np.arange(len(row.nodes.parent_M)) - 1)


def _state_leaks(row: PackedRow) -> PackedRow:
    return replace(row, nodes=_chained(row), _cache={})


def _attention_leaks(row: PackedRow) -> PackedRow:
    nodes = _chained(row)
    lengths_M = torch.from_numpy(nodes.stop_M - nodes.start_M)
    enter_S, leave_S = (torch.from_numpy(v).repeat_interleave(lengths_M) for v in nodes.intervals_M)
    here = row.enter_S.device
    return replace(row, nodes=nodes, enter_S=enter_S.to(here), leave_S=leave_S.to(here), _cache={})


def _convolution_leaks(row: PackedRow) -> PackedRow:
    before_S = torch.arange(row.length, device=row.previous_S.device) - 1
    return replace(row, previous_S=before_S.to(row.previous_S.dtype), _cache={})


def _normalises(config: ModelConfig) -> bool:
    return config.is_moe and config.norm_topk_prob


def _has_shared_expert(config: ModelConfig) -> bool:
    return config.shared_expert_size > 0


@contextmanager
def shared_gate_open(trainer: TrainerState) -> Iterator[None]:
    for layer in _modules(trainer, MoE):
        layer.shared_experts.gate_weight.data.zero_()
    yield


def _norm_read_otherwise(zero_centered: bool) -> bool:
    return not zero_centered


MODEL_FAULTS = (
    Fault("query and gate rows swapped", "a fused matrix is split in another order than it was joined", PARITY,
          "weights", rows_swapped),
    Fault("1 + w norm read as w", "a family stores its norms around 0, another around 1", PARITY, "weights",
          _on_all(RMSNorm, "zero_centered", _norm_read_otherwise)),
    Fault("norm epsilon ten times too large", "a constant of another family is used", PARITY, "weights",
          _on_all(RMSNorm, "eps", lambda eps: eps * 10)),
    Fault("wrong rope theta", "the base of the rotary angles comes from a default and not from the config", PARITY,
          "weights", rope_theta),
    Fault("one layer skipped", "an off-by-one in the loop over layers or in the pipeline's stages", PARITY, "weights",
          layer_skipped),
    Fault("a transposed expert", "a stacked tensor is read in the other order of rows and columns", PARITY, "weights",
          expert_transposed, moe),
    Fault("top-k probabilities not renormalised", "the config's norm_topk_prob is not read", PARITY, "weights",
          _on_all(Router, "normalise", lambda _value: False), _normalises),
    Fault("the shared expert's gate left out", "an optional part of the family is not loaded", PARITY, "weights",
          shared_gate_open, _has_shared_expert),
    Fault("sum turned into mean", "a reduction averages gradients that must be added", PARITY, "weights", sum_as_mean),
    Fault("one gradient lost", "a parameter is used through a detached copy", PARITY, "weights", gradient_lost),
    Fault("an optimizer that decays norms", "one weight decay for all parameters", PARITY, "weights", norms_decay),
    Fault("LoRA scale applied twice", "alpha / rank is merged into B and applied again", PARITY, "adapters",
          lora_scale_twice),
    Fault("rope off by one for packed rows", "positions count places of the row and not of the sequence", PACKING,
          "packing", _rows(_positions_off)),
    Fault("attention sees the sample before", "a mask that is causal in the row only", PACKING, "packing",
          _rows(_attention_leaks)),
    Fault("state leaks between packed samples", "a recurrent state is not reset where a sample begins", PACKING,
          "packing", _rows(_state_leaks), hybrid),
    Fault("convolution leaks between packed samples", "a causal convolution runs over the row", PACKING, "packing",
          _rows(_convolution_leaks), hybrid),
)  # fmt: skip
"""Planted in the trainers of `hf_parity` and `packing_invariance`."""
