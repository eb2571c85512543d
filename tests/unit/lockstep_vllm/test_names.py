"""Every way that a shipped name can meet a live one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep_vllm.names import UnknownWeightError, resolve

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}
L = "model.layers.3."
PLAIN = {
    "model.embed_tokens.weight",
    f"{L}self_attn.qkv_proj.weight",
    f"{L}self_attn.qkv_proj.bias",
    f"{L}self_attn.o_proj.weight",
    f"{L}self_attn.q_norm.weight",
    f"{L}mlp.gate_up_proj.weight",
    f"{L}mlp.down_proj.weight",
    f"{L}mlp.gate.weight",
    f"{L}mlp.experts.routed_experts.w13_weight",
    f"{L}mlp.experts.routed_experts.w2_weight",
    f"{L}linear_attn.in_proj_qkvz.weight",
    f"{L}linear_attn.in_proj_ba.weight",
    f"{L}linear_attn.A_log",
    f"{L}linear_attn.dt_bias",
    f"{L}linear_attn.conv1d.weight",
    f"{L}linear_attn.out_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
}
WRAPPED = {
    "model.embed_tokens.base_layer.weight",
    f"{L}self_attn.qkv_proj.base_layer.weight",
    f"{L}self_attn.qkv_proj.base_layer.bias",
    f"{L}self_attn.o_proj.base_layer.weight",
    f"{L}self_attn.q_norm.weight",
    f"{L}mlp.gate_up_proj.base_layer.weight",
    f"{L}mlp.down_proj.base_layer.weight",
    f"{L}mlp.gate.weight",
    f"{L}mlp.experts.base_layer.routed_experts.w13_weight",
    f"{L}mlp.experts.base_layer.routed_experts.w2_weight",
    f"{L}linear_attn.in_proj_qkvz.base_layer.weight",
    f"{L}linear_attn.in_proj_ba.base_layer.weight",
    f"{L}linear_attn.A_log",
    f"{L}linear_attn.dt_bias",
    f"{L}linear_attn.conv1d.weight",
    f"{L}linear_attn.out_proj.base_layer.weight",
    "model.norm.weight",
    "lm_head.base_layer.weight",
}
OLD_EXPERTS = {f"{L}mlp.experts.w13_weight", f"{L}mlp.experts.w2_weight", f"{L}mlp.experts.w13_bias"}

CASES = [
    # shipped, live names, handed to load_weights
    # present as it is
    ("model.norm.weight", PLAIN, "model.norm.weight"),
    (f"{L}linear_attn.A_log", PLAIN, f"{L}linear_attn.A_log"),
    (f"{L}linear_attn.dt_bias", WRAPPED, f"{L}linear_attn.dt_bias"),
    (f"{L}linear_attn.conv1d.weight", WRAPPED, f"{L}linear_attn.conv1d.weight"),
    (f"{L}self_attn.o_proj.base_layer.weight", WRAPPED, f"{L}self_attn.o_proj.base_layer.weight"),
    # a base_layer segment added before the leaf, weight and bias
    (f"{L}self_attn.o_proj.weight", WRAPPED, f"{L}self_attn.o_proj.base_layer.weight"),
    ("model.embed_tokens.weight", WRAPPED, "model.embed_tokens.base_layer.weight"),
    ("lm_head.weight", WRAPPED, "lm_head.base_layer.weight"),
    (f"{L}self_attn.o_proj.bias", {f"{L}self_attn.o_proj.base_layer.bias"}, f"{L}self_attn.o_proj.base_layer.bias"),
    # one removed
    (f"{L}self_attn.o_proj.base_layer.weight", PLAIN, f"{L}self_attn.o_proj.weight"),
    ("lm_head.base_layer.weight", PLAIN, "lm_head.weight"),
    # fused owners: known, and not renamed
    (f"{L}self_attn.q_proj.weight", PLAIN, f"{L}self_attn.q_proj.weight"),
    (f"{L}self_attn.v_proj.bias", PLAIN, f"{L}self_attn.v_proj.bias"),
    (f"{L}mlp.up_proj.weight", PLAIN, f"{L}mlp.up_proj.weight"),
    (f"{L}self_attn.k_proj.weight", WRAPPED, f"{L}self_attn.k_proj.base_layer.weight"),
    (f"{L}self_attn.q_proj.bias", WRAPPED, f"{L}self_attn.q_proj.base_layer.bias"),
    (f"{L}mlp.gate_proj.base_layer.weight", PLAIN, f"{L}mlp.gate_proj.weight"),
    (f"{L}mlp.gate_up_proj.weight", PLAIN, f"{L}mlp.gate_up_proj.weight"),
    # GatedDeltaNet
    (f"{L}linear_attn.in_proj_qkv.weight", PLAIN, f"{L}linear_attn.in_proj_qkv.weight"),
    (f"{L}linear_attn.in_proj_z.weight", WRAPPED, f"{L}linear_attn.in_proj_z.base_layer.weight"),
    (f"{L}linear_attn.in_proj_b.weight", PLAIN, f"{L}linear_attn.in_proj_b.weight"),
    (f"{L}linear_attn.in_proj_a.base_layer.weight", PLAIN, f"{L}linear_attn.in_proj_a.weight"),
    (f"{L}linear_attn.out_proj.weight", WRAPPED, f"{L}linear_attn.out_proj.base_layer.weight"),
    # experts, one by one and stacked (names without a leaf), in both of vLLM's places
    (f"{L}mlp.experts.7.gate_proj.weight", PLAIN, f"{L}mlp.experts.7.gate_proj.weight"),
    (f"{L}mlp.experts.7.up_proj.weight", OLD_EXPERTS, f"{L}mlp.experts.7.up_proj.weight"),
    (f"{L}mlp.experts.0.gate_proj.bias", OLD_EXPERTS, f"{L}mlp.experts.0.gate_proj.bias"),
    (f"{L}mlp.experts.7.down_proj.weight", PLAIN, f"{L}mlp.experts.7.down_proj.weight"),
    (f"{L}mlp.experts.7.down_proj.weight", WRAPPED, f"{L}mlp.experts.7.down_proj.base_layer.weight"),
    (f"{L}mlp.experts.gate_up_proj", PLAIN, f"{L}mlp.experts.gate_up_proj"),
    (f"{L}mlp.experts.down_proj", OLD_EXPERTS, f"{L}mlp.experts.down_proj"),
    (f"{L}mlp.experts.base_layer.gate_up_proj", PLAIN, f"{L}mlp.experts.gate_up_proj"),
    (f"{L}mlp.experts.base_layer.down_proj", OLD_EXPERTS, f"{L}mlp.experts.down_proj"),
    (f"{L}mlp.experts.base_layer.3.gate_proj.weight", OLD_EXPERTS, f"{L}mlp.experts.3.gate_proj.weight"),
    (f"{L}mlp.experts.base_layer.gate_up_proj", WRAPPED, f"{L}mlp.experts.base_layer.gate_up_proj"),
    (f"{L}mlp.experts.gate_up_proj", WRAPPED, f"{L}mlp.experts.base_layer.gate_up_proj"),
    (f"{L}mlp.gate.weight", WRAPPED, f"{L}mlp.gate.weight"),
]
UNKNOWN = [
    (f"{L}self_attn.z_proj.weight", PLAIN),
    (f"{L}self_attn.o_proj.bias", PLAIN),  # the module is there, its bias is not
    ("model.layers.4.self_attn.q_proj.weight", PLAIN),
    (f"{L}self_attn.o_proj.base_layer.base_layer.weight", PLAIN),  # two segments too many
    (f"{L}self_attn.q_proj.weight", {f"{L}self_attn.qkv_proj.base_layer.base_layer.weight"}),
    (f"{L}mlp.experts.0.gate_proj.weight", PLAIN - {f"{L}mlp.experts.routed_experts.w13_weight"}),
    (f"{L}mlp.experts.base_layer.0.gate_proj.base_layer.weight", OLD_EXPERTS),
    (f"{L}mlp.experts.w13_weight", PLAIN),
    ("lm_head.weight", PLAIN - {"lm_head.weight"}),
    ("", PLAIN),
]


@pytest.mark.parametrize(("name", "live", "expected"), CASES)
def test_known_names(name, live, expected):
    assert resolve(name, live, PACKED) == expected
    assert resolve(name, sorted(live), PACKED) == expected


@pytest.mark.parametrize(("name", "live"), UNKNOWN)
def test_unknown_names_are_errors_that_name_the_tensor(name, live):
    with pytest.raises(UnknownWeightError) as failure:
        resolve(name, live, PACKED)
    assert repr(name) in str(failure.value)


def test_the_mapper_decides_and_never_renames():
    def mapper(name: str) -> str | None:
        return None if name.startswith("mtp.") else name.replace("model.language_model.", "model.", 1)

    shipped = f"model.language_model.{L.removeprefix('model.')}"
    assert resolve(f"{shipped}self_attn.q_proj.weight", PLAIN, PACKED, mapper) == f"{shipped}self_attn.q_proj.weight"
    assert resolve(f"{shipped}mlp.experts.1.up_proj.weight", PLAIN, PACKED, mapper).startswith(shipped)
    wrapped = resolve(f"{shipped}self_attn.q_proj.weight", WRAPPED, PACKED, mapper)
    assert wrapped == f"{shipped}self_attn.q_proj.base_layer.weight"
    with pytest.raises(UnknownWeightError, match="mtp"):
        resolve("mtp.layers.0.weight", PLAIN, PACKED, mapper)
    with pytest.raises(UnknownWeightError):
        resolve(f"{shipped}self_attn.q_proj.weight", PLAIN, PACKED)


def test_without_packed_modules_a_part_is_unknown():
    with pytest.raises(UnknownWeightError):
        resolve(f"{L}self_attn.q_proj.weight", PLAIN, {})


SEGMENT = st.sampled_from(
    ["model", "layers", "0", "1", "mlp", "experts", "q_proj", "base_layer", "weight", "bias", "x"]
)
NAMES = st.lists(SEGMENT, min_size=1, max_size=6).map(".".join)


@given(name=NAMES, live=st.frozensets(NAMES, max_size=8))
def test_a_resolved_name_differs_by_at_most_one_segment(name, live):
    if name in live:
        assert resolve(name, live, PACKED) == name
        return
    try:
        resolved = resolve(name, live, PACKED)
    except UnknownWeightError:
        return
    added = abs(resolved.count("base_layer") - name.count("base_layer"))
    assert added <= 1
    assert [part for part in resolved.split(".") if part != "base_layer"] == [
        part for part in name.split(".") if part != "base_layer"
    ]
