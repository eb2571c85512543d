"""Weights of every family, layout and parallel size go both ways without changing a byte, and land where Megatron
expects them.
"""

from __future__ import annotations

import filecmp
import itertools
import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import Recipe, write_checkpoint
from lockstep.engine.weight_sync.buckets import BucketFiller
from lockstep.engine.weight_sync.plan import SyncPlan, plan_sources
from lockstep.engine.weight_sync.sources import share_sources
from lockstep.errors import ConfigError
from lockstep.models.checkpoint.export import export_checkpoint
from lockstep.models.checkpoint.load import load_shards
from lockstep.models.checkpoint.read import Checkpoint, expected_tensors, open_checkpoint
from lockstep.models.checkpoint.shares import share_out
from lockstep.models.config import ModelConfig, parse_config, read_json
from lockstep.models.contract import Piece, Shard, Sizes
from lockstep.models.handler import ModelSupportHandler
from lockstep.models.layout_rules import padded_vocab
from lockstep.models.parallel_sizes import stage_layers
from lockstep.models.registry import get_model_support_handler_for_spec, get_model_support_spec
from lockstep.validate.reference.assembled import hf_tensors
from lockstep_wire import plan as wire

Ranks = list[tuple[list[Shard], dict[str, torch.Tensor]]]
KEYS = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "llama3")
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def recipes(draw: st.DrawFn, key: str) -> Recipe:
    kv_heads, group = draw(st.sampled_from((1, 2, 3, 4))), draw(st.sampled_from((1, 2, 3)))
    tied, moe, hybrid = draw(st.booleans()), key.endswith("moe"), key.startswith("qwen3_5")
    fields = {
        "vocab_size": draw(st.integers(5, 40)),
        "hidden_size": kv_heads * group * 4 if key == "llama3" else draw(st.sampled_from((8, 10, 16))),
        "num_hidden_layers": draw(st.integers(2, 5)),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from((8, 16, 24))),
        "intermediate_size": draw(st.sampled_from((6, 7, 12))),
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    if moe:
        fields |= {
            "num_experts": draw(st.integers(2, 5)),
            "num_experts_per_tok": 2,
            "moe_intermediate_size": draw(st.sampled_from((3, 4, 6))),
        }
    if key == "qwen3_moe":
        fields["mlp_only_layers"] = draw(st.sampled_from(([], [0], [1])))
    if key == "qwen3_5_moe":
        fields["shared_expert_intermediate_size"] = draw(st.sampled_from((3, 4)))
    if hybrid:
        keys = draw(st.sampled_from((1, 2, 3)))
        fields |= {
            "linear_num_key_heads": keys,
            "linear_num_value_heads": keys * draw(st.sampled_from((1, 2))),
            "linear_key_head_dim": draw(st.sampled_from((2, 4))),
            "linear_value_head_dim": draw(st.sampled_from((2, 3))),
            "linear_conv_kernel_dim": draw(st.sampled_from((2, 4))),
            "layer_types": draw(
                st.lists(
                    st.sampled_from(("linear_attention", "full_attention")),
                    min_size=fields["num_hidden_layers"],
                    max_size=fields["num_hidden_layers"],
                )
            ),
        }
    mtp = draw(st.sampled_from(({}, {"mtp_num_hidden_layers": 1}, {"num_nextn_predict_layers": 1}))) if hybrid else {}
    return Recipe(
        key,
        fields,
        released=hybrid and draw(st.booleans()),
        stacked=moe and draw(st.booleans()),
        stored_tied_head=tied and draw(st.booleans()),
        files=draw(st.sampled_from((1, 3))),
        mtp=mtp,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
    )


def load(folder: Path) -> tuple[ModelSupportHandler, ModelConfig, Checkpoint]:
    spec = get_model_support_spec(str(folder))
    handler, config = get_model_support_handler_for_spec(spec), parse_config(read_json(folder), spec)
    return handler, config, open_checkpoint(folder, handler, config)


def coordinates(tp: int, ep: int, etp: int, pp: int) -> list[Sizes]:
    ranks = itertools.product(range(tp), range(ep), range(etp), range(pp))
    return [Sizes(tp, t, ep, e, etp, x, pp, p) for t, e, x, p in ranks]


def divides(config: ModelConfig, tp: int, ep: int, etp: int) -> bool:
    """Written from the sizes' meaning, not from the code: every split dimension must be whole, heads before rows."""
    split = [
        config.heads,
        config.mlp_size,
        config.shared_expert_size,
        config.linear_key_heads,
        config.linear_value_heads,
    ]
    heads = config.kv_heads % tp == 0 or tp % config.kv_heads == 0
    experts = (ep, etp) == (1, 1) or (config.is_moe and config.experts % ep == 0 and config.expert_size % etp == 0)
    return heads and experts and all(size % tp == 0 for size in split)


@pytest.mark.parametrize("key", KEYS)
@QUICK
@given(data=st.data())
def test_round_trip_is_exact_in_bytes(key: str, data: st.DataObject) -> None:
    recipe = data.draw(recipes(key))
    tp, ep, etp, pp = (data.draw(st.sampled_from((1, 2)), label=n) for n in ("tp", "ep", "etp", "pp"))
    layers = recipe.fields["num_hidden_layers"]
    cut = data.draw(st.integers(1, layers - 1), label="layers of the first stage")
    stages = stage_layers(layers, pp, [cut, layers - cut] if pp == 2 else None)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "in"), Path(scratch, "out")
        write_checkpoint(recipe, source)
        handler, config, checkpoint = load(source)
        if not divides(config, tp, ep, etp):
            with pytest.raises(ConfigError, match=r"tensor|expert"):
                [handler.shards(config, checkpoint.layout, s, stages[s.pp_rank]) for s in coordinates(tp, ep, etp, pp)]
            return
        ranks = []
        for sizes in coordinates(tp, ep, etp, pp):
            shards = handler.shards(config, checkpoint.layout, sizes, stages[sizes.pp_rank])
            ranks.append((shards, dict(load_shards(checkpoint, shards))))
            assert [tuple(ranks[-1][1][s.megatron].shape) for s in shards] == [s.shape for s in shards]
        shapes = expected_tensors(handler, config, checkpoint.layout)
        export_checkpoint(checkpoint, hf_tensors(ranks, shapes), target)
        names = sorted(p.name for p in source.iterdir())
        assert names == sorted(p.name for p in target.iterdir())
        assert filecmp.cmpfiles(source, target, names, shallow=False) == (names, [], [])
        replicas = data.draw(st.integers(1, 2), label="replicas") * ranks
        at_once = data.draw(st.sampled_from((1, 200, 1 << 26)), label="elements of a stack merged at once")
        with mock.patch("lockstep.engine.weight_sync.sources.MERGED_ELEMENTS", at_once):
            check_sync(replicas, shapes, recipe.dtype, data.draw(st.integers(100, 3000), label="bytes of a bucket"))


def check_sync(ranks: Ranks, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, bucket_bytes: int) -> None:
    """Each rank sends its share of a sync; what the receiver puts together is what the export writes, and no byte came twice."""
    shares = share_out([shards for shards, _ in ranks], shapes)
    described = [[piece for share in own for piece in share_sources(share, shapes, dtype)] for own in shares]
    plan = SyncPlan(tuple(plan_sources([source for source, _ in of_sender], bucket_bytes) for of_sender in described))
    received = wire.parse(json.loads(json.dumps(plan.to_json())))
    bytes_of = {}
    for sender, (of_sender, (_, sender_tensors)) in enumerate(zip(described, ranks, strict=True)):
        # The trainer holds all in one dtype; a checkpoint keeps some tensors wider.
        tensors = [(s.key, sender_tensors[p.name][slice(*(p.experts or (None, None)))].to(dtype)) for s, p in of_sender]
        for index, _, bytes_N in BucketFiller(plan.senders[sender]).fill(tensors):
            bytes_of[sender, index] = bytes_N.clone()
    buffers = [bytes_of[bucket.sender, bucket.index] for bucket in received.buckets]
    assembled = dict(wire.assemble(received, buffers))
    expected = {name: tensor.to(dtype) for name, tensor in hf_tensors(ranks, shapes)}
    assert assembled.keys() == expected.keys()
    assert all(
        torch.equal(assembled[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in expected.items()
    )
    assert plan.nbytes == sum(tensor.nbytes for tensor in expected.values())


def fused_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: ModelConfig) -> torch.Tensor:
    hidden = q.shape[-1]
    q = q.view(c.kv_heads, c.heads // c.kv_heads, 2 if c.output_gate else 1, c.head_dim, hidden)
    parts = [q[:, :, i] for i in range(q.shape[2])]
    parts += [k.view(c.kv_heads, 1, c.head_dim, hidden), v.view(c.kv_heads, 1, c.head_dim, hidden)]
    return torch.cat(parts, 1).reshape(-1, hidden)


@pytest.mark.parametrize("key", KEYS)
@settings(QUICK, max_examples=15)
@given(data=st.data(), tp=st.sampled_from((1, 2)), etp=st.sampled_from((1, 2)), ep=st.sampled_from((1, 2)))
def test_shards_are_megatrons_layout(key: str, data: st.DataObject, tp: int, etp: int, ep: int) -> None:
    """Against the layout formulas in plain tensor operations."""
    recipe = data.draw(recipes(key))
    with tempfile.TemporaryDirectory() as scratch:
        hf = write_checkpoint(recipe, Path(scratch, "in"))
        handler, config, checkpoint = load(Path(scratch, "in"))
        if not divides(config, tp, ep, etp):
            return
        sizes = Sizes(tp, tp - 1, ep, ep - 1, etp, etp - 1)
        loaded = dict(load_shards(checkpoint, handler.shards(config, checkpoint.layout, sizes, range(config.layers))))
    prefix = checkpoint.layout.prefix

    def own_part(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return x.chunk(tp, dim)[tp - 1]

    vocab = torch.nn.functional.pad(
        hf[f"{prefix}embed_tokens.weight"], (0, 0, 0, padded_vocab(config, tp) - config.vocab_size)
    )
    assert torch.equal(loaded["embedding.word_embeddings.weight"], own_part(vocab))
    for layer in range(config.layers):
        there, here = f"{prefix}layers.{layer}.", f"decoder.layers.{layer}."
        if config.layer_types[layer] == "full_attention":
            q, k, v = (hf[f"{there}self_attn.{n}_proj.weight"] for n in "qkv")
            assert torch.equal(loaded[f"{here}self_attention.linear_qkv.weight"], own_part(fused_qkv(q, k, v, config)))
            assert torch.equal(
                loaded[f"{here}self_attention.linear_proj.weight"], own_part(hf[f"{there}self_attn.o_proj.weight"], 1)
            )
        else:
            keys, values = (
                config.linear_key_heads * config.linear_key_dim,
                config.linear_value_heads * config.linear_value_dim,
            )
            for ours, theirs in (("in_proj_qkv.weight", "in_proj_qkv.weight"), ("conv_weight", "conv1d.weight")):
                blocks = hf[f"{there}linear_attn.{theirs}"].split([keys, keys, values])
                assert torch.equal(loaded[f"{here}self_attention.{ours}"], torch.cat([own_part(b) for b in blocks]))
            assert torch.equal(loaded[f"{here}self_attention.A_log"], own_part(hf[f"{there}linear_attn.A_log"]))
        if config.moe_layers[layer]:
            local = range(config.experts // ep * (ep - 1), config.experts)
            w1, w2 = loaded[f"{here}mlp.experts.w1"], loaded[f"{here}mlp.experts.w2"]
            for place, expert in enumerate(local):
                base = f"{there}mlp.experts."
                if recipe.stacked:
                    gate, up = hf[f"{base}gate_up_proj"][expert].chunk(2)
                    down = hf[f"{base}down_proj"][expert]
                else:
                    gate, up, down = (hf[f"{base}{expert}.{n}_proj.weight"] for n in ("gate", "up", "down"))
                assert torch.equal(w1[place], torch.cat([gate.chunk(etp)[etp - 1], up.chunk(etp)[etp - 1]]))
                assert torch.equal(w2[place], down.chunk(etp, 1)[etp - 1])
        else:
            gate, up = hf[f"{there}mlp.gate_proj.weight"], hf[f"{there}mlp.up_proj.weight"]
            assert torch.equal(loaded[f"{here}mlp.linear_fc1.weight"], torch.cat([own_part(gate), own_part(up)]))


@pytest.mark.parametrize("key", KEYS)
@settings(QUICK, max_examples=15)
@given(data=st.data(), tp=st.sampled_from((1, 2)), ep=st.sampled_from((1, 2)), etp=st.sampled_from((1, 2)))
def test_lora_sites_add_what_the_pieces_read(key: str, data: st.DataObject, tp: int, ep: int, etp: int) -> None:
    """Adding B @ A to the Hugging Face weights and loading is the same as loading and adding each site's rows and
    columns.
    """
    recipe = data.draw(recipes(key))
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(recipe, Path(scratch, "in"))
        handler, config, checkpoint = load(Path(scratch, "in"))
    if not divides(config, tp, ep, etp):
        return
    generator = torch.Generator().manual_seed(1)
    deltas = {
        site.module: torch.randn(site.out_features, site.in_features, generator=generator)
        for shard in handler.all_shards(config, checkpoint.layout)
        for site in shard.sites
    }
    for sizes in coordinates(tp, ep, etp, 1):
        for shard in handler.shards(config, checkpoint.layout, sizes, range(config.layers)):
            if not shard.sites:
                continue
            by_sites = torch.zeros(shard.shape)
            for site in shard.sites:
                into = by_sites if site.local_expert is None else by_sites[site.local_expert]
                for rows in site.rows:
                    count = rows.stop - rows.start
                    into[rows.shard_start : rows.shard_start + count] += deltas[site.module][
                        rows.start : rows.stop, slice(*site.cols)
                    ]
            by_pieces = torch.cat([piece_of(deltas, piece) for piece in shard.pieces]).view(shard.shape)
            assert torch.equal(by_sites, by_pieces)


def piece_of(deltas: dict[str, torch.Tensor], piece: Piece) -> torch.Tensor:
    """The part of the Hugging Face weight's change that a piece reads, from the canonical modules' changes."""
    assert piece.name is not None
    base, leaf = piece.name.replace("model.language_model.", "model.").removesuffix(".weight").rsplit(".", 1)
    base = base if piece.index is None else f"{base}.{piece.index}"
    if base.rsplit(".", 2)[-2] != "experts":
        change = deltas[f"{base}.{leaf}"]
    else:
        fused = f"{base}.gate_up_proj"
        gate, up = (
            deltas[fused].chunk(2) if fused in deltas else (deltas[f"{base}.gate_proj"], deltas[f"{base}.up_proj"])
        )
        change = {"gate_proj": gate, "up_proj": up, "gate_up_proj": torch.cat([gate, up])}.get(leaf)
        change = deltas[f"{base}.down_proj"] if change is None else change
    return change[piece.start : piece.stop, piece.col_start : piece.col_stop]
