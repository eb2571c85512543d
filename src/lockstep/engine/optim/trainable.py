"""The trained parameters, each with its shard of the weight contract, whether a base weight or an
adapter's matrix.

Adapter parameters get shards of their own, built from the contract's LoRA sites. The canonical
tensor names are `<module>.lora_A` `[r, in]` and `<module>.lora_B` `[out, r]`. Loading, optimizer
state and gradient sums treat both kinds alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.engine.layers.lora import ExpertAdapter, Part
from lockstep.errors import ConfigError, WeightsError
from lockstep.models.checkpoint.peft import initial_a
from lockstep.models.contract import LoraSite, Piece, Shard

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trainable:
    """A parameter that is trained.

    `shapes`: full shape of every Hugging Face tensor its pieces come from.

    domain: as in the contract, and "expert": whole experts over EP, the same on every ETP rank (an
        adapter's unsplit matrix).
    """

    name: str
    parameter: nn.Parameter
    pieces: tuple[Piece, ...]
    domain: str
    shapes: Mapping[str, Shape]

    @property
    def row_width(self) -> int:
        """Elements of one row as pieces count them (the last two dims of a stack of experts are
        rows and columns).
        """
        return self.parameter.shape[-1] if len(self.parameter.shape) > 1 else 1


def base_trainables(model: nn.Module, shards: Sequence[Shard], shapes: Mapping[str, Shape]) -> list[Trainable]:
    """All weights of the model, made trainable. Raises WeightsError when contract and model differ."""
    parameters = dict(model.named_parameters())
    wanted = {s.megatron for s in shards}
    if wanted != set(parameters):
        raise WeightsError(
            f"the weight contract and the model differ: only in the contract {sorted(wanted - set(parameters))}, "
            f"only in the model {sorted(set(parameters) - wanted)}"
        )
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return [
        Trainable(
            s.megatron, parameters[s.megatron], s.pieces, s.domain, {p.name: shapes[p.name] for p in s.pieces if p.name}
        )
        for s in shards
    ]


def attach_adapters(
    model: nn.Module, shards: Sequence[Shard], targets: Sequence[str], rank: int, alpha: float, seed: int
) -> list[Trainable]:
    """Put an adapter on every weight that `targets` name, initialised (A uniform, B zero), and
    return its parameters.

    Raises ConfigError for a target that no weight of this stage has; callers with several stages
    check the whole model first.
    """
    trainables: list[Trainable] = []
    for shard in shards:
        sites = [s for s in shard.sites if s.target in targets]
        if sites:
            trainables += _attach(model, shard, sites, rank, alpha / rank, seed)
    if not trainables:
        raise ConfigError(f"none of the LoRA targets {', '.join(targets)} exists in this model")
    return trainables


def _attach(
    model: nn.Module, shard: Shard, sites: Sequence[LoraSite], rank: int, scale: float, seed: int
) -> list[Trainable]:
    owner_name, _, leaf = shard.megatron.rpartition(".")
    owner: Any = model.get_submodule(owner_name)
    parts = adapter_parts(sites)
    if shard.domain == "expert_tensor":
        adapter: Any = ExpertAdapter(getattr(owner, leaf), parts, rank, scale)
        slot = f"{leaf}_adapter"
    else:
        adapter = owner.make_adapter(parts, rank, scale)
        slot = "adapter"
    setattr(owner, slot, adapter)
    # Asked of the whole weight: with more TP ranks than key heads a rank can hold a module's rows
    # entirely, and its neighbour none.
    split_rows = any(sum(m.stop - m.start for m in site.rows) != site.out_features for site in shard.sites)
    for name, parameter in adapter.lora_A.items():
        _initialise(parameter, _of_module(sites, name), rank, seed)
    return list(describe_adapter(f"{owner_name}.{slot}", adapter, sites, split_rows, rank))


def _last(site: LoraSite) -> str:
    return site.module.rsplit(".", 1)[-1]


def _of_module(sites: Sequence[LoraSite], name: str) -> list[LoraSite]:
    """The sites of one Hugging Face module. For a stack of experts: the sites of all experts, in
    the order in which this rank holds them.
    """
    return sorted((s for s in sites if _last(s) == name), key=lambda s: s.local_expert or 0)


def adapter_parts(sites: Sequence[LoraSite]) -> list[Part]:
    """One part per Hugging Face module; a stack of experts repeats the same rows, so its first
    expert speaks for all.
    """
    first = {}
    for site in sites:
        first.setdefault(_last(site), site)
    return [
        Part(name, tuple(row for m in site.rows for row in range(m.shard_start, m.shard_start + m.stop - m.start)))
        for name, site in first.items()
    ]


def describe_adapter(
    prefix: str, adapter: Any, sites: Sequence[LoraSite], split_rows: bool, rank: int
) -> Iterator[Trainable]:
    """An adapter's parameters as what is trained.

    adapter: of `engine.lora`, made from `adapter_parts(sites)`.
    prefix: its name.

    split_rows: the weight's rows are spread over ranks.
    """
    experts = isinstance(adapter, ExpertAdapter)
    for name in adapter.lora_A:
        members = _of_module(sites, name)
        split_columns = members[0].cols != (0, members[0].in_features)
        shapes = {f"{s.module}.lora_A": (rank, s.in_features) for s in members}
        columns = members[0].cols if split_columns else (None, None)
        a_pieces = tuple(Piece(f"{s.module}.lora_A", 0, rank, *columns) for s in members)
        yield Trainable(
            f"{prefix}.lora_A.{name}", adapter.lora_A[name], a_pieces, _domain(experts, split_columns), shapes
        )
        shapes = {f"{s.module}.lora_B": (s.out_features, rank) for s in members}
        b_pieces = tuple(Piece(f"{s.module}.lora_B", m.start, m.stop) for s in members for m in s.rows)
        yield Trainable(f"{prefix}.lora_B.{name}", adapter.lora_B[name], b_pieces, _domain(experts, split_rows), shapes)


def _domain(experts: bool, split: bool) -> str:
    if experts:
        return "expert_tensor" if split else "expert"
    return "tensor" if split else "replicated"


@torch.no_grad()
def _initialise(parameter: Tensor, sites: Sequence[LoraSite], rank: int, seed: int) -> None:
    initial = [initial_a(s, rank, seed)[:, s.cols[0] : s.cols[1]] for s in sites]
    parameter.copy_(torch.stack(initial).view_as(parameter))


@torch.no_grad()
def assign(trainables: Sequence[Trainable], tensors: Mapping[str, Tensor]) -> None:
    """Fill parameters from whole Hugging Face tensors by name. Raises WeightsError for one that is
    missing or of another shape.
    """
    for trainable in trainables:
        if trainable.pieces:  # else this rank holds no row of it
            trainable.parameter.copy_(own_part(trainable, tensors))


def own_part(trainable: Trainable, tensors: Mapping[str, Tensor]) -> Tensor:
    """This rank's part of whole Hugging Face tensors, in the parameter's shape. Raises WeightsError
    for one that is missing or of another shape.
    """
    rows = []
    for piece in trainable.pieces:
        if piece.name is None:
            rows.append(torch.zeros(piece.rows, trainable.row_width))
            continue
        if piece.name not in tensors:
            raise WeightsError(
                f"{piece.name} is missing; the adapter or checkpoint is incomplete or belongs to another model"
            )
        tensor = tensors[piece.name]
        if tuple(tensor.shape) != trainable.shapes[piece.name]:
            raise WeightsError(
                f"{piece.name} has shape {tuple(tensor.shape)}, expected {trainable.shapes[piece.name]}; "
                "rank, targets or base model differ"
            )
        part = tensor if piece.index is None else tensor[piece.index]
        rows.append(part[piece.start : piece.stop, slice(piece.col_start, piece.col_stop)] if part.dim() > 1 else part)
    return torch.cat(rows).view_as(trainable.parameter)
