"""Weights between Hugging Face checkpoints and Megatron shards, both ways, from the contract's pieces.

Shape suffixes: O output rows, I input columns, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.errors import WeightsError
from lockstep.families.checkpoint import Checkpoint
from lockstep.families.contract import Piece, Shard


def load_shards(
    checkpoint: Checkpoint,
    shards: Iterable[Shard],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Megatron name, tensor) of one rank, reading only the slices it holds.

    One shard is in memory at a time beside what the caller keeps. dtype None keeps the checkpoint's.
    """
    layer = ""
    for shard in shards:
        if shard.megatron.rsplit(".", 3)[0] != layer:
            checkpoint.release()  # lets go of the mapped pages, so that they don't add up over the model
            layer = shard.megatron.rsplit(".", 3)[0]
        yield shard.megatron, _load_one(checkpoint, shard, device, dtype)
    checkpoint.release()


def _load_one(checkpoint: Checkpoint, shard: Shard, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    parts = {piece: checkpoint.read(piece) for piece in shard.pieces[:1] if piece.name is not None}
    kept = dtype or (next(iter(parts.values())).dtype if parts else _any_dtype(checkpoint, shard))
    whole = torch.empty(shard.shape, dtype=kept, device=device)
    rows = flat_rows(whole, shard)
    for piece, at in placed(shard):
        into = rows[at : at + piece.rows]
        if piece.name is None:
            into.zero_()
        else:
            into.copy_(parts[piece] if piece in parts else checkpoint.read(piece))
    return whole


def _any_dtype(checkpoint: Checkpoint, shard: Shard) -> torch.dtype:
    """A shard of nothing but padding takes the embedding's dtype."""
    name = f"{checkpoint.layout.prefix}embed_tokens.weight"
    return checkpoint.read(Piece(name, 0, 1)).dtype


def flat_rows(tensor: Tensor, shard: Shard) -> Tensor:
    """The view in which a shard's pieces are stacked along dim 0: stacked experts lose their expert dimension."""
    return tensor.view(-1, tensor.shape[-1]) if shard.domain == "expert_tensor" else tensor


def placed(shard: Shard) -> Iterator[tuple[Piece, int]]:
    """Every piece with the row it starts at in `flat_rows`."""
    at = 0
    for piece in shard.pieces:
        yield piece, at
        at += piece.rows


# ------------------------------------------------------------------------------------------------ Megatron to Hugging
# Face


@dataclass(frozen=True)
class Copy:
    """Rows from `at` on of a rank's parameter (its expert dimension flattened if `stacked`) are one piece of a Hugging
    Face tensor.
    """

    rank: int
    megatron: str
    at: int
    piece: Piece
    stacked: bool


@dataclass(frozen=True)
class ExportStep:
    """Hugging Face tensors (name to full shape) that can be put together from the parameters in `sources`."""

    shapes: Mapping[str, tuple[int, ...]]
    copies: tuple[Copy, ...]

    @property
    def sources(self) -> tuple[tuple[int, str], ...]:
        """(rank, Megatron name) of every parameter the step reads, each once."""
        return tuple(dict.fromkeys((copy.rank, copy.megatron) for copy in self.copies))


def plan_export(ranks: Sequence[Sequence[Shard]], shapes: Mapping[str, tuple[int, ...]]) -> list[ExportStep]:
    """How to put every Hugging Face tensor together from the ranks' shards, in model order, each byte from one rank.

    ranks: the shards of every distinct coordinate; the lowest rank that holds a piece supplies it. shapes: full shapes
    (`expected_tensors`). Every process can compute the same plan without talking to the others. Raises WeightsError
    when the shards leave a part of a tensor uncovered.
    """
    copies: dict[str, dict[Piece, Copy]] = {}
    groups = _Groups()
    for rank, shards in enumerate(ranks):
        for shard in shards:
            names = [p.name for p in shard.pieces if p.name is not None]
            groups.join(names)
            for piece, at in placed(shard):
                if piece.name is not None:
                    copies.setdefault(piece.name, {}).setdefault(
                        piece, Copy(rank, shard.megatron, at, piece, shard.domain == "expert_tensor")
                    )
    for name, pieces in copies.items():
        covered = sum(_elements(piece, shapes[name]) for piece in pieces)
        if covered != torch.Size(shapes[name]).numel():
            raise WeightsError(
                f"{name}: the ranks hold {covered} of {torch.Size(shapes[name]).numel()} elements; a rank is missing"
            )
    absent = sorted(n for n in shapes if n not in copies and n != "lm_head.weight")
    if absent:
        raise WeightsError(f"no rank holds {absent[0]} ({len(absent)} tensors); a rank is missing")
    return [
        ExportStep({n: shapes[n] for n in names}, tuple(c for n in names for c in copies[n].values()))
        for names in groups.in_order()
    ]


class _Groups:
    """Names that share a parameter belong to one step."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while self.parent.setdefault(name, name) != name:
            name = self.parent[name] = self.parent[self.parent[name]]
        return name

    def join(self, names: Sequence[str]) -> None:
        for name in names:
            self.parent[self.root(name)] = self.root(names[0])

    def in_order(self) -> Iterable[tuple[str, ...]]:
        grouped: dict[str, list[str]] = {}
        for name in list(self.parent):
            grouped.setdefault(self.root(name), []).append(name)
        return [tuple(names) for names in grouped.values()]


def _elements(piece: Piece, shape: tuple[int, ...]) -> int:
    tail = shape[2:] if piece.index is not None else shape[1:]
    if piece.col_start is not None and piece.col_stop is not None:
        tail = (piece.col_stop - piece.col_start, *tail[1:])
    return piece.rows * torch.Size(tail).numel()


def assemble(step: ExportStep, parameter: Callable[[int, str], Tensor]) -> dict[str, Tensor]:
    """Put a step's tensors together; `parameter(rank, megatron name)` hands out the shards."""
    held = {source: parameter(*source) for source in step.sources}
    done: dict[str, Tensor] = {}
    for copy in step.copies:
        piece, source = copy.piece, held[copy.rank, copy.megatron]
        assert piece.name is not None
        if piece.name not in done:
            done[piece.name] = source.new_empty(step.shapes[piece.name])
        into = done[piece.name] if piece.index is None else done[piece.name][piece.index]
        into = into[piece.start : piece.stop]
        if piece.col_start is not None:
            into = into[:, piece.col_start : piece.col_stop]
        rows = source.reshape(-1, source.shape[-1]) if copy.stacked else source
        into.copy_(rows[copy.at : copy.at + piece.rows])
    return done


def hf_tensors(
    ranks: Sequence[tuple[Sequence[Shard], Mapping[str, Tensor]]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of a model whose ranks all live in this process: each rank's shards and
    parameters.
    """
    for step in plan_export([shards for shards, _ in ranks], shapes):
        yield from assemble(step, lambda rank, name: ranks[rank][1][name]).items()


def merged(shard: Shard, tensor: Tensor, adapter: Mapping[str, Tensor], scale: float) -> Tensor:
    """`tensor` plus scale * B @ A of every pair in `adapter` that lands in it, computed in fp32 and rounded once.

    adapter: canonical names, `<module>.lora_A` `[r, in]` and `<module>.lora_B` `[out, r]`; modules it lacks change
    nothing.
    """
    sites = [site for site in shard.sites if site.rows and f"{site.module}.lora_A" in adapter]
    if not sites:
        return tensor
    wide = tensor.to(torch.float32, copy=True)
    for site in sites:
        a_RI = adapter[f"{site.module}.lora_A"][:, site.cols[0] : site.cols[1]].to(wide)
        b_OR = adapter[f"{site.module}.lora_B"].to(wide)
        into_OI = wide if site.local_expert is None else wide[site.local_expert]
        for rows in site.rows:
            delta_OI = b_OR[rows.start : rows.stop] @ a_RI
            into_OI[rows.shard_start : rows.shard_start + delta_OI.shape[0]] += scale * delta_OI
    return wide.to(tensor.dtype)
