"""The weight contract: where every Megatron parameter comes from in a Hugging Face checkpoint, as
data.

A shard of a Megatron parameter is an ordered list of `Piece`s. Each piece is a contiguous range of
rows (for row-parallel weights, of columns) of one Hugging Face tensor. The shard is the pieces
stacked along dim 0. Reading a piece and writing it back are the same statement in two directions.
So loading, export, merge, adapters and the sync plan all come from one list.

Nothing here imports torch: pieces are plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Domain = Literal["replicated", "tensor", "expert_tensor"]
"""Over which ranks a parameter differs. `tensor`: split over TP. `expert_tensor`: whole experts
over EP and each expert's matrices over ETP. `replicated`: the same on every rank (of its pipeline
stage).
"""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of the Hugging Face tensor `name`, and columns [col_start, col_stop) when
    the weight is split by columns.

    `index` selects one expert of a stacked `[E, ...]` tensor first; rows and columns then count
    inside that expert. `name` None means rows that exist only in Megatron (vocabulary padding):
    filled with zeros on load, skipped on export.
    """

    name: str | None
    start: int
    stop: int
    col_start: int | None = None
    col_stop: int | None = None
    index: int | None = None

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes and this rank's coordinates, as far as weights care."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0
    pp: int = 1
    pp_rank: int = 0


@dataclass(frozen=True)
class Layout:
    """The names a checkpoint uses, where its family allows several.

    prefix: of the text model's tensors, `model.` or (released multimodal class)
        `model.language_model.`.
    stacked_experts: True for `experts.gate_up_proj` `[E, 2I, H]` and `experts.down_proj` `[E, H,
        I]`; False for one tensor per expert.
    stored_tied_head: the checkpoint stores `lm_head.weight` although it is tied to the embedding.
        It is read from the embedding and written back as a copy.
    """

    prefix: str = "model."
    stacked_experts: bool = False
    stored_tied_head: bool = False


@dataclass(frozen=True)
class RowMap:
    """Rows [start, stop) of B (Hugging Face row order) land in shard rows from `shard_start` on."""

    start: int
    stop: int
    shard_start: int


@dataclass(frozen=True)
class LoraSite:
    """One low-rank pair and where B @ A lands in a Megatron parameter of this rank.

    target: the name a user puts in `target_modules` (`q_proj`, `experts`, ...).
    module: canonical module name, the same for every checkpoint layout and parallel size:
        `model.layers.3.self_attn.q_proj`, for experts `model.layers.3.mlp.experts.7.down_proj`.
        `layer` is the global layer number.
    expert: global expert number; `local_expert` its place in this rank's stacked parameter. None
        outside routed experts.
    out_features, in_features: of the whole module: A is `[r, in_features]`, B `[out_features, r]`,
        in Hugging Face row order.
    rows: which rows of B this rank's shard holds and where (shard rows of a stacked expert count
        inside that expert). With more TP ranks than key heads a rank may hold none of a module's
        rows: its ranks then still share A.
    cols: range of A's columns that the shard covers (all of them unless the weight is split by
        columns).
    """

    target: str
    module: str
    layer: int
    megatron: str
    out_features: int
    in_features: int
    rows: tuple[RowMap, ...]
    cols: tuple[int, int]
    expert: int | None = None
    local_expert: int | None = None


@dataclass(frozen=True)
class Shard:
    """One Megatron parameter as one rank holds it.

    megatron: its name in the local model's state dict (layer numbers are local to the pipeline stage).
    shape: of the shard. pieces: stacked along dim 0 they are the shard (for a stacked-experts parameter: flattened to
    `[E_local*rows, cols]`).
    domain: over which ranks it differs. sites: the LoRA pairs whose deltas land in it (empty: none).
    """

    megatron: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    domain: Domain = "replicated"
    sites: tuple[LoraSite, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The LoRA targets that touch this parameter, in the order of their rows."""
        return tuple(dict.fromkeys(site.target for site in self.sites))
