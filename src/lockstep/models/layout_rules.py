"""Layout rules: how Hugging Face tensors become one rank's Megatron parameters. Families compose
these.

Row orders (source: Megatron-Core 0.16.1's local layer spec). Fused QKV rows run, per KV head, `[its
q heads | their gates | k | v]`. A gate/up pair is `[gate | up]` *per rank*. GatedDeltaNet's fused
projection is `[q | k | v]` per rank. H is hidden_size below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lockstep.models.config import ModelConfig
from lockstep.models.contract import Layout, LoraSite, Piece, RowMap, Shard, Sizes
from lockstep.models.parallel_sizes import check_sizes


@dataclass(frozen=True)
class Stage:
    """The question to a contract: one rank's part of the layers `layers` (global numbers) of a
    model.
    """

    config: ModelConfig
    layout: Layout
    sizes: Sizes
    layers: range

    @property
    def first(self) -> bool:
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        return self.layers.stop == self.config.layers

    def local(self, layer: int) -> str:
        return f"decoder.layers.{layer - self.layers.start}."

    def source(self, layer: int) -> str:
        return f"{self.layout.prefix}layers.{layer}."

    def canonical(self, layer: int) -> str:
        return f"model.layers.{layer}."


@dataclass(frozen=True)
class Linear:
    """One weight matrix `[rows, cols]`: its tensor name, and its LoRA target and canonical module
    name (empty: no LoRA).
    """

    name: str
    rows: int
    cols: int
    target: str = ""
    module: str = ""
    layer: int = 0


def linear(stage: Stage, layer: int, module: str, rows: int, cols: int) -> Linear:
    """The matrix of `module` (`self_attn.q_proj`) of one layer, as a LoRA target under its last
    name.
    """
    return Linear(
        f"{stage.source(layer)}{module}.weight",
        rows,
        cols,
        module.rsplit(".", 1)[-1],
        stage.canonical(layer) + module,
        layer,
    )


def replicated(megatron: str, name: str, *shape: int) -> Shard:
    """The same tensor on every rank."""
    return Shard(megatron, shape, (Piece(name, 0, shape[0]),))


def split_rows(megatron: str, name: str, rows: int, tail: tuple[int, ...], sizes: Sizes) -> Shard:
    """Rank r of TP holds rows [r, r + 1) * rows / TP of a tensor `[rows, *tail]` without LoRA."""
    part = rows // sizes.tp
    return Shard(megatron, (part, *tail), (Piece(name, sizes.tp_rank * part, (sizes.tp_rank + 1) * part),), "tensor")


def column(megatron: str, weight: Linear, sizes: Sizes) -> Shard:
    """Column-parallel matrix: output rows are split over TP."""
    part = weight.rows // sizes.tp
    start = sizes.tp_rank * part
    return _stacked_pieces(megatron, [(weight, start, start + part)])


def row(megatron: str, weight: Linear, sizes: Sizes) -> Shard:
    """Row-parallel matrix: input columns are split over TP."""
    part = weight.cols // sizes.tp
    low, high = sizes.tp_rank * part, (sizes.tp_rank + 1) * part
    piece = Piece(weight.name, 0, weight.rows, low, high)
    site = _site(megatron, weight, (RowMap(0, weight.rows, 0),), (low, high))
    return Shard(megatron, (weight.rows, part), (piece,), "tensor", site)


def gate_up(megatron: str, gate: Linear, up: Linear, sizes: Sizes) -> Shard:
    """`[gate | up]` rows of this TP rank."""
    part = gate.rows // sizes.tp
    start = sizes.tp_rank * part
    return _stacked_pieces(megatron, [(gate, start, start + part), (up, start, start + part)])


def tri_split(blocks: Sequence[int], sizes: Sizes) -> list[tuple[int, int]]:
    """This TP rank's row range in each of several stacked blocks of rows."""
    ranges, base = [], 0
    for rows in blocks:
        part = rows // sizes.tp
        ranges.append((base + sizes.tp_rank * part, base + (sizes.tp_rank + 1) * part))
        base += rows
    return ranges


def qkv(megatron: str, stage: Stage, layer: int) -> Shard:
    """Fused, interleaved query/[gate]/key/value rows. Hugging Face's gated q_proj has rows `[q |
    gate]` per head.
    """
    config, dim = stage.config, stage.config.head_dim
    gates = 2 if config.output_gate else 1
    group = config.heads // config.kv_heads
    q = linear(stage, layer, "self_attn.q_proj", config.heads * dim * gates, config.hidden_size)
    k = linear(stage, layer, "self_attn.k_proj", config.kv_heads * dim, config.hidden_size)
    v = linear(stage, layer, "self_attn.v_proj", config.kv_heads * dim, config.hidden_size)
    fused: list[tuple[Linear, int, int]] = []
    for kv in range(config.kv_heads):
        for part in range(gates):
            for head in range(kv * group, (kv + 1) * group):
                start = (head * gates + part) * dim
                fused.append((q, start, start + dim))
        fused += [(k, kv * dim, (kv + 1) * dim), (v, kv * dim, (kv + 1) * dim)]
    rows = sum(stop - start for _, start, stop in fused) // stage.sizes.tp
    return _stacked_pieces(megatron, _window(fused, stage.sizes.tp_rank * rows, rows), (q, k, v))


def _window(blocks: Iterable[tuple[Linear, int, int]], start: int, rows: int) -> list[tuple[Linear, int, int]]:
    """Rows [start, start + rows) of stacked row ranges."""
    kept, base = [], 0
    for weight, low, high in blocks:
        first, last = max(low, low + start - base), min(high, low + start + rows - base)
        if first < last:
            kept.append((weight, first, last))
        base += high - low
    return kept


def _stacked_pieces(megatron: str, ranges: Sequence[tuple[Linear, int, int]], weights: Sequence[Linear] = ()) -> Shard:
    """A shard of whole-width row ranges, split over TP; neighbouring ranges of one matrix are
    joined.

    weights: matrices that have a LoRA site on every rank and in this order, also where none of
        their rows are held.
    """
    joined: list[tuple[Linear, int, int]] = []
    for weight, start, stop in ranges:
        if joined and joined[-1][0] is weight and joined[-1][2] == start:
            joined[-1] = (weight, joined[-1][1], stop)
        else:
            joined.append((weight, start, stop))
    pieces, row = [], 0
    rows_of: dict[int, tuple[Linear, list[RowMap]]] = {id(weight): (weight, []) for weight in weights}
    for weight, start, stop in joined:
        pieces.append(Piece(weight.name, start, stop))
        rows_of.setdefault(id(weight), (weight, []))[1].append(RowMap(start, stop, row))
        row += stop - start
    sites = tuple(
        s for weight, rows in rows_of.values() for s in _site(megatron, weight, tuple(rows), (0, weight.cols))
    )
    return Shard(megatron, (row, joined[0][0].cols), tuple(pieces), "tensor", sites)


def _site(megatron: str, weight: Linear, rows: tuple[RowMap, ...], cols: tuple[int, int]) -> tuple[LoraSite, ...]:
    if not weight.target:
        return ()
    return (LoraSite(weight.target, weight.module, weight.layer, megatron, weight.rows, weight.cols, rows, cols),)


# ------------------------------------------------------------------------------------------------ whole parts of a
# model


def padded_vocab(config: ModelConfig, tp: int) -> int:
    """Rows of the embedding and the head in Megatron: the vocabulary rounded up to a multiple of
    TP.
    """
    return -(-config.vocab_size // tp) * tp


def vocabulary(megatron: str, name: str, stage: Stage) -> Shard:
    """Vocabulary-parallel rows; the rows past the end of the vocabulary are zeros."""
    config, sizes = stage.config, stage.sizes
    part = padded_vocab(config, sizes.tp) // sizes.tp
    start = min(sizes.tp_rank * part, config.vocab_size)
    stop = min((sizes.tp_rank + 1) * part, config.vocab_size)
    pieces = [Piece(name, start, stop)] if stop > start else []
    if stop - start < part:
        pieces.append(Piece(None, 0, part - (stop - start)))
    return Shard(megatron, (part, config.hidden_size), tuple(pieces), "tensor")


def ends(stage: Stage) -> list[Shard]:
    """Embedding on the first stage; final norm and head on the last. A tied head exists only where
    the embedding lives on another stage.
    """
    config, prefix = stage.config, stage.layout.prefix
    embedding, shards = f"{prefix}embed_tokens.weight", []
    if stage.first:
        shards.append(vocabulary("embedding.word_embeddings.weight", embedding, stage))
    if stage.last:
        shards.append(replicated("decoder.final_layernorm.weight", f"{prefix}norm.weight", config.hidden_size))
        if not config.tied:
            shards.append(vocabulary("output_layer.weight", "lm_head.weight", stage))
        elif not stage.first:
            shards.append(vocabulary("output_layer.weight", embedding, stage))
    return shards


def norms(stage: Stage, layer: int) -> list[Shard]:
    """The two norms around every layer's mixer and MLP."""
    here, there, hidden = stage.local(layer), stage.source(layer), stage.config.hidden_size
    return [
        replicated(f"{here}input_layernorm.weight", f"{there}input_layernorm.weight", hidden),
        replicated(f"{here}pre_mlp_layernorm.weight", f"{there}post_attention_layernorm.weight", hidden),
    ]


def attention(stage: Stage, layer: int) -> list[Shard]:
    """Softmax attention, with q/k norms and an output gate where the family has them."""
    config, here, there = stage.config, stage.local(layer) + "self_attention.", stage.source(layer) + "self_attn."
    out = linear(stage, layer, "self_attn.o_proj", config.hidden_size, config.heads * config.head_dim)
    shards = [qkv(f"{here}linear_qkv.weight", stage, layer), row(f"{here}linear_proj.weight", out, stage.sizes)]
    if config.qk_norm:
        shards.append(replicated(f"{here}q_layernorm.weight", f"{there}q_norm.weight", config.head_dim))
        shards.append(replicated(f"{here}k_layernorm.weight", f"{there}k_norm.weight", config.head_dim))
    return shards


def gated_delta_net(stage: Stage, layer: int) -> list[Shard]:
    """Linear attention (arXiv:2412.06464): projections and convolution head-parallel over TP, the
    per-head norm replicated.
    """
    config, sizes = stage.config, stage.sizes
    here, there = stage.local(layer) + "self_attention.", stage.source(layer) + "linear_attn."
    keys, values = config.linear_key_heads * config.linear_key_dim, config.linear_value_heads * config.linear_value_dim
    hidden, heads, total = config.hidden_size, config.linear_value_heads, 2 * keys + values
    ranges = tri_split((keys, keys, values), sizes)
    mixed = linear(stage, layer, "linear_attn.in_proj_qkv", total, hidden)
    conv = tuple(Piece(f"{there}conv1d.weight", start, stop) for start, stop in ranges)
    shards = [_stacked_pieces(f"{here}in_proj_qkv.weight", [(mixed, start, stop) for start, stop in ranges])]
    for name, rows in (("in_proj_z", values), ("in_proj_b", heads), ("in_proj_a", heads)):
        shards.append(column(f"{here}{name}.weight", linear(stage, layer, f"linear_attn.{name}", rows, hidden), sizes))
    shards += [
        Shard(f"{here}conv_weight", (total // sizes.tp, 1, config.conv_kernel), conv, "tensor"),
        split_rows(f"{here}A_log", f"{there}A_log", heads, (), sizes),
        split_rows(f"{here}dt_bias", f"{there}dt_bias", heads, (), sizes),
        replicated(f"{here}norm.weight", f"{there}norm.weight", config.linear_value_dim),
        row(f"{here}out_proj.weight", linear(stage, layer, "linear_attn.out_proj", hidden, values), sizes),
    ]
    return shards


def mlp(stage: Stage, layer: int, module: str = "mlp", megatron: str = "mlp", size: int = 0) -> list[Shard]:
    """Gated MLP: also the shared expert, under its own names and size."""
    here, hidden, size = stage.local(layer) + megatron, stage.config.hidden_size, size or stage.config.mlp_size
    gate, up = (linear(stage, layer, f"{module}.{name}", size, hidden) for name in ("gate_proj", "up_proj"))
    down = linear(stage, layer, f"{module}.down_proj", hidden, size)
    return [
        gate_up(f"{here}.linear_fc1.weight", gate, up, stage.sizes),
        row(f"{here}.linear_fc2.weight", down, stage.sizes),
    ]


def moe(stage: Stage, layer: int) -> list[Shard]:
    """Router, routed experts, and the shared expert with its own gate where the model has one."""
    config, here, there = stage.config, stage.local(layer) + "mlp.", stage.source(layer) + "mlp."
    shards = [replicated(f"{here}router.weight", f"{there}gate.weight", config.experts, config.hidden_size)]
    shards += experts(stage, layer)
    if config.shared_expert_size:
        shards += mlp(stage, layer, "mlp.shared_expert", "mlp.shared_experts", config.shared_expert_size)
        shards.append(
            replicated(f"{here}shared_experts.gate_weight", f"{there}shared_expert_gate.weight", 1, config.hidden_size)
        )
    return shards


def experts(stage: Stage, layer: int) -> list[Shard]:
    """Stacked parameters of this EP rank: `experts.w1` `[E_local, 2f, H]` and `experts.w2`
    `[E_local, H, f]`, f split over ETP.
    """
    config, sizes = stage.config, stage.sizes
    count, size = config.experts // sizes.ep, config.expert_size // sizes.etp
    low, high = sizes.etp_rank * size, (sizes.etp_rank + 1) * size
    first: list[Piece] = []
    second: list[Piece] = []
    sites1: list[LoraSite] = []
    sites2: list[LoraSite] = []
    w1, w2 = f"{stage.local(layer)}mlp.experts.w1", f"{stage.local(layer)}mlp.experts.w2"
    for local in range(count):
        expert = sizes.ep_rank * count + local
        gate, up, down = _expert_pieces(stage, layer, expert, low, high)
        first += [gate, up]
        second.append(down)
        sites1 += _expert_sites(stage, layer, expert, local, w1, low, high)
        module = f"{stage.canonical(layer)}mlp.experts.{expert}.down_proj"
        rows = (RowMap(0, config.hidden_size, 0),)
        sites2.append(
            LoraSite(
                "experts", module, layer, w2, config.hidden_size, config.expert_size, rows, (low, high), expert, local
            )
        )
    return [
        Shard(w1, (count, 2 * size, config.hidden_size), tuple(first), "expert_tensor", tuple(sites1)),
        Shard(w2, (count, config.hidden_size, size), tuple(second), "expert_tensor", tuple(sites2)),
    ]


def _expert_pieces(stage: Stage, layer: int, expert: int, low: int, high: int) -> tuple[Piece, Piece, Piece]:
    base, size, hidden = f"{stage.source(layer)}mlp.experts.", stage.config.expert_size, stage.config.hidden_size
    if stage.layout.stacked_experts:
        fused, down = f"{base}gate_up_proj", f"{base}down_proj"
        return (
            Piece(fused, low, high, index=expert),
            Piece(fused, size + low, size + high, index=expert),
            Piece(down, 0, hidden, low, high, index=expert),
        )
    prefix = f"{base}{expert}."
    return (
        Piece(f"{prefix}gate_proj.weight", low, high),
        Piece(f"{prefix}up_proj.weight", low, high),
        Piece(f"{prefix}down_proj.weight", 0, hidden, low, high),
    )


def _expert_sites(
    stage: Stage, layer: int, expert: int, local: int, megatron: str, low: int, high: int
) -> list[LoraSite]:
    config, part = stage.config, high - low
    size, hidden, base = config.expert_size, config.hidden_size, f"{stage.canonical(layer)}mlp.experts.{expert}."
    gate, up = RowMap(low, high, 0), RowMap(low, high, part)
    if config.fused_expert_lora:
        rows = (gate, RowMap(size + low, size + high, part))
        return [
            LoraSite(
                "experts", f"{base}gate_up_proj", layer, megatron, 2 * size, hidden, rows, (0, hidden), expert, local
            )
        ]
    return [
        LoraSite("experts", f"{base}{name}", layer, megatron, size, hidden, (rows,), (0, hidden), expert, local)
        for name, rows in (("gate_proj", gate), ("up_proj", up))
    ]


def decoder(stage: Stage, layer_parts: Callable[[Stage, int], list[Shard]]) -> list[Shard]:
    """Every parameter of one rank, in model order: the ends around `layer_parts(stage, layer)` of
    each layer.
    """
    check_sizes(stage.config, stage.sizes)
    around = ends(stage)
    before = [s for s in around if s.megatron.startswith("embedding.")]
    after = [s for s in around if not s.megatron.startswith("embedding.")]
    return before + [shard for layer in stage.layers for shard in layer_parts(stage, layer)] + after
