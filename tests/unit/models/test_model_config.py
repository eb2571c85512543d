"""config.json in every spelling; what contradicts itself or the family is refused with the field's name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers

from checkpoints import TEXT, Recipe, config_json
from lockstep.errors import UnsupportedModelError
from lockstep.models.config import ModelConfig, parse_config
from lockstep.models.registry import get_model_support_spec_by_key

KEYS = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "llama3")


def parse(key: str, raw: dict[str, Any]) -> ModelConfig:
    return parse_config(raw, get_model_support_spec_by_key(key))


def default(key: str, released: bool = False) -> dict[str, Any]:
    return config_json(Recipe(key, {"head_dim": 64} if key == "qwen3_moe" else {}, released=released))


@pytest.mark.parametrize("key", KEYS)
def test_agrees_with_transformers(key: str) -> None:
    theirs, ours = (
        getattr(transformers, TEXT[key]).config_class(head_dim=64),
        parse(key, default(key) | {"head_dim": 64}),
    )
    assert (ours.hidden_size, ours.layers, ours.vocab_size) == (
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.vocab_size,
    )
    assert (ours.heads, ours.kv_heads, ours.head_dim) == (theirs.num_attention_heads, theirs.num_key_value_heads, 64)
    assert (ours.norm_eps, ours.tied, ours.rope.theta) == (
        theirs.rms_norm_eps,
        theirs.tie_word_embeddings,
        theirs.rope_parameters["rope_theta"],
    )
    assert ours.rope.dim == int(64 * theirs.rope_parameters.get("partial_rotary_factor", 1.0))
    assert list(ours.layer_types) == list(getattr(theirs, "layer_types", None) or ["full_attention"] * ours.layers)
    if ours.is_moe:
        assert (ours.experts, ours.experts_per_token, ours.expert_size) == (
            theirs.num_experts,
            theirs.num_experts_per_tok,
            theirs.moe_intermediate_size,
        )
    assert ours.unknown_fields == ()


@pytest.mark.parametrize("key", ["qwen3_5", "qwen3_5_moe"])
def test_nested_is_flat(key: str) -> None:
    flat, nested = parse(key, default(key)), parse(key, default(key, released=True))
    differ = {"architecture", "nested", "eos_token_ids"}
    assert {k: v for k, v in vars(flat).items() if k not in differ} == {
        k: v for k, v in vars(nested).items() if k not in differ
    }
    assert (flat.nested, nested.nested) == (False, True)


def test_rope_in_either_spelling() -> None:
    raw = default("qwen3_5")
    assert raw["rope_parameters"]["partial_rotary_factor"] == 0.25
    old = {k: v for k, v in raw.items() if k != "rope_parameters"} | {
        "rope_theta": raw["rope_parameters"]["rope_theta"],
        "partial_rotary_factor": 0.25,
        "rope_scaling": {"type": "mrope", "mrope_section": [11, 11, 10], "mrope_interleaved": True},
    }
    assert parse("qwen3_5", raw).rope == parse("qwen3_5", old).rope


@pytest.mark.parametrize("name", ["num_nextn_predict_layers", "mtp_num_hidden_layers"])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_mtp_is_found_in_every_spelling(name: str, released: bool, inside: bool) -> None:
    raw = default("qwen3_5", released)
    (raw["text_config"] if released and inside else raw)[name] = 2
    config = parse("qwen3_5", raw)
    assert (config.mtp_layers, config.unknown_fields) == (2, ())
    assert config.layers == parse("qwen3_5", default("qwen3_5", released)).layers


WRONG = [
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"attention_dropout": 0.1}, "attention_dropout"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 128}, "sliding-window"),
    ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ("qwen3", {"hidden_size": "8"}, "hidden_size is '8'"),
    ("qwen3", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("qwen3", {"num_key_value_heads": 5}, "num_key_value_heads 5"),
    ("qwen3", {"head_dim": None}, "head_dim is None"),
    ("qwen3", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    (
        "qwen3",
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "trick": 1}},
        "unknown rope parameters trick",
    ),
    ("qwen3", {"rope_theta": 5e5}, "rope_theta is 500000.0"),
    ("qwen3", {"rope_parameters": None}, "rope_theta is None"),
    ("qwen3", {"rope_parameters": [1]}, "rope_parameters is [1]"),
    ("qwen3", {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ("qwen3", {"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
    ("qwen3", {"layer_types": 2}, "layer_types is 2"),
    ("qwen3", {"layer_types": [None] * 32}, "layer_types is [None"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ("qwen3", {"layer_types": ["linear_attention"] * 32}, "layer_types contains linear_attention"),
    ("qwen3", {"num_experts": 8}, "is dense"),
    ("qwen3", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ("qwen3", {"eos_token_id": [1, "2"]}, "eos_token_id"),
    ("qwen3_moe", {"num_experts_per_tok": 999}, "num_experts_per_tok 999"),
    ("qwen3_moe", {"num_experts": 128, "num_local_experts": 3}, "num_local_experts is 3"),
    ("qwen3_moe", {"mlp_only_layers": [99]}, "mlp_only_layers"),
    ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate is False"),
    ("qwen3_5", {"linear_num_value_heads": 5}, "linear_num_value_heads 5"),
    ("qwen3_5", {"mtp_num_hidden_layers": 1, "num_nextn_predict_layers": 2}, "multi-token-prediction"),
    ("qwen3_5", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("qwen3_5", {"text_config": [1]}, "text_config is list"),
    ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
]


@pytest.mark.parametrize(("key", "change", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_values_are_refused_by_name(key: str, change: dict[str, Any], message: str) -> None:
    raw = default(key) | change
    with pytest.raises(UnsupportedModelError, match=r"config\.json: ") as caught:
        parse(key, raw)
    assert message in str(caught.value)


def test_levels_must_agree() -> None:
    raw = default("qwen3_5", released=True)
    tied = copy.deepcopy(raw)
    tied["text_config"]["tie_word_embeddings"] = not tied["tie_word_embeddings"]
    with pytest.raises(UnsupportedModelError, match=r"tie_word_embeddings is .* at the top level but"):
        parse("qwen3_5", tied)


def test_moe_layers_follow_step_and_exceptions() -> None:
    raw = default("qwen3_moe") | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert parse("qwen3_moe", raw).moe_layers == (False, True, False, False, False, True)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(
            ("qwen3", name)
            for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
        ),
        *(("qwen3", name) for name in ("head_dim", "vocab_size", "max_position_embeddings", "intermediate_size")),
        *(("qwen3_moe", name) for name in ("num_experts", "moe_intermediate_size", "num_experts_per_tok")),
        *(("qwen3_5", name) for name in ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")),
    ],
)
def test_m12_sizes_that_no_model_has_are_refused_at_once(key: str, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name} is 1e[+]30, expected at most"):
        parse(key, default(key) | {name: 10**30})
