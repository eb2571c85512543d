"""A model's `config.json` as plain numbers, checked. No transformers, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lockstep.errors import ConfigError, UnsupportedModelError
from lockstep.models.config_fields import IGNORED, MTP_FIELDS, READ
from lockstep.models.spec import LayerKind, ModelSupportSpec


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of each head's first `dim` dimensions. "llama3" scales low frequencies."""

    theta: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The text model. Sizes count elements; a size of 0 means the model has no such part.

    layer_types and moe_layers have one entry per layer. rope applies to full-attention layers.
    mtp_layers counts the checkpoint's multi-token-prediction layers, which are never trained.
    unknown_fields are set in the file and read by nobody: possible risks.
    """

    key: str
    architecture: str
    nested: bool
    hidden_size: int
    layers: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    output_gate: bool
    zero_centered_norm: bool
    rope: Rope
    layer_types: tuple[LayerKind, ...]
    moe_layers: tuple[bool, ...]
    mlp_size: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    norm_topk_prob: bool = False
    fused_expert_lora: bool = False
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    conv_kernel: int = 0
    eos_token_ids: tuple[int, ...] = ()
    mtp_layers: int = 0
    unknown_fields: tuple[str, ...] = ()

    @property
    def is_moe(self) -> bool:
        return any(self.moe_layers)


_MOST_PARTS = 1 << 14
"""Layers, heads or experts: they are enumerated."""
_MOST_SIZE = 1 << 24
"""Rows, columns or positions."""


class _Fields:
    """Checked, flat access to a config. Nested text fields win; contradictions are refused."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        nested = raw.get("text_config")
        if nested is not None and not isinstance(nested, Mapping):
            raise UnsupportedModelError(
                f"{source}: text_config is {type(nested).__name__}, expected an object; repair the file"
            )
        self.source, self.outer = source, raw
        self.text: Mapping[str, Any] = raw if nested is None else nested
        self.nested = nested is not None

    def fail(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.source}: {what}")

    def get(self, name: str, default: Any = None) -> Any:
        inner, outer = self.text.get(name), self.outer.get(name)
        if self.nested and inner is not None and outer is not None and inner != outer:
            raise self.fail(f"{name} is {outer!r} at the top level but {inner!r} in text_config; make them agree")
        value = inner if inner is not None else outer
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = _MOST_SIZE) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(f"{name} is {value!r}, expected an integer of at least {least}")
        if value > most:
            raise self.fail(f"{name} is {float(value):.3g}, expected at most {most}: the file is damaged")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A number of layers, heads or experts."""
        return self.integer(name, default, most=_MOST_PARTS)

    def number(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.fail(f"{name} is {value!r}, expected a positive number")
        return float(value)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.fail(f"{name} is {value!r}, expected an object")
        return dict(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(f"{name} is {value!r}, expected true or false")
        return value

    def only(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise self.fail(f"{name} is {value!r}; only {' or '.join(map(repr, allowed))} is supported")


def read_json(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder. Raises UnsupportedModelError if there is no object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{folder} has no config.json; give a Hugging Face checkpoint folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnsupportedModelError(f"{path} is not valid JSON ({error}); download the checkpoint again") from error
    if not isinstance(raw, dict):
        raise UnsupportedModelError(f"{path} holds {type(raw).__name__}, expected an object")
    return raw


def architecture(raw: Mapping[str, Any]) -> str | None:
    """The model class a config names, or None."""
    names = raw.get("architectures")
    return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None


def parse_config(raw: Mapping[str, Any], spec: ModelSupportSpec, source: str = "config.json") -> ModelConfig:
    """Check every field that decides the mathematics and return the model as plain numbers.

    Raises UnsupportedModelError for a missing, unknown or contradicting field.
    """
    fields, traits = _Fields(raw, source), spec.traits
    _refuse_unsupported(fields, spec)
    hidden, heads, layers = (
        fields.integer("hidden_size"),
        *map(fields.count, ("num_attention_heads", "num_hidden_layers")),
    )
    default_dim = hidden // heads if traits.head_dim_from_hidden and hidden % heads == 0 else None
    head_dim, kv_heads = fields.integer("head_dim", default_dim), fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.fail(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    moe_layers = _moe_layers(fields, spec, layers)
    layer_types = _layer_types(fields, spec, layers)
    return ModelConfig(
        key=spec.key,
        architecture=architecture(raw) or spec.architectures[0],
        nested=fields.nested,
        hidden_size=hidden,
        layers=layers,
        vocab_size=fields.integer("vocab_size"),
        max_positions=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps"),
        tied=fields.flag("tie_word_embeddings", False),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm=traits.qk_norm,
        output_gate=traits.output_gate,
        zero_centered_norm=traits.zero_centered_norm,
        rope=_rope(fields, spec, head_dim),
        layer_types=layer_types,
        moe_layers=moe_layers,
        mlp_size=0 if all(moe_layers) else fields.integer("intermediate_size"),
        fused_expert_lora=traits.fused_expert_lora,
        eos_token_ids=_token_ids(fields, "eos_token_id"),
        mtp_layers=_mtp_layers(fields),
        unknown_fields=_unknown_fields(fields),
        **(_expert_sizes(fields, spec) if any(moe_layers) else {}),
        **(_linear_sizes(fields) if "linear_attention" in layer_types else {}),
    )


def _refuse_unsupported(fields: _Fields, spec: ModelSupportSpec) -> None:
    fields.only("hidden_act", ("silu",))
    fields.only("attention_bias", (False,))
    fields.only("mlp_bias", (False,))
    fields.only("attention_dropout", (0.0, 0))
    fields.only("attn_output_gate", (spec.traits.output_gate,))
    slides = fields.get("use_sliding_window", "use_sliding_window" not in fields.text)
    if slides and fields.get("sliding_window") is not None:
        raise fields.fail("sliding-window attention is not supported; choose a model with full attention")
    if fields.get("quantization_config") is not None:
        raise fields.fail("the checkpoint is quantized; train from the unquantized release")


def _rope(fields: _Fields, spec: ModelSupportSpec, head_dim: int) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and the older fields beside it."""
    new, old = fields.mapping("rope_parameters"), fields.mapping("rope_scaling")
    both = sorted(k for k in set(new) & set(old) if new[k] != old[k])
    if both:
        raise fields.fail(f"rope_parameters and rope_scaling disagree on {', '.join(both)}")
    values = {**old, **new}
    for name in ("rope_theta", "partial_rotary_factor"):
        flat = fields.get(name)
        if flat is not None and values.setdefault(name, flat) != flat:
            raise fields.fail(f"{name} is {flat!r}, but {values[name]!r} in the rope parameters; make them agree")
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if kind == "mrope" and "mrope_section" in values:
        kind = "default"  # an older name for three position axes, which text moves along together
    if kind not in spec.traits.rope_types:
        raise fields.fail(
            f"rope type {kind!r} is not supported for {spec.key}; known: {', '.join(spec.traits.rope_types)}"
        )
    theta, share = values.pop("rope_theta", None), values.pop("partial_rotary_factor", spec.traits.partial_rotary)
    if not isinstance(theta, int | float) or theta <= 0:
        raise fields.fail(f"rope_theta is {theta!r}, expected a positive number")
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise fields.fail(f"partial_rotary_factor is {share!r}, expected a number")
    dim = int(head_dim * share) if math.isfinite(share) else 0
    if not 0 < dim <= head_dim or dim % 2:
        raise fields.fail(
            f"partial_rotary_factor {share!r} of head_dim {head_dim} gives {dim} rotary dimensions, not an even number"
        )
    for name in ("mrope_section", "mrope_interleaved"):
        values.pop(name, None)  # text-only positions make every axis equal, and then sections change nothing
    scaling = _rope_scaling(fields, values) if kind == "llama3" else {}
    if values:
        raise fields.fail(f"unknown rope parameters {', '.join(sorted(values))}")
    return Rope(theta=float(theta), dim=dim, kind=kind, **scaling)


def _rope_scaling(fields: _Fields, values: dict[str, Any]) -> dict[str, Any]:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [n for n in names if not isinstance(values.get(n), int | float)]
    if missing:
        raise fields.fail(f"rope type llama3 lacks {', '.join(missing)}")
    factor, low, high, positions = (values.pop(n) for n in names)
    return {
        "factor": float(factor),
        "low_freq_factor": float(low),
        "high_freq_factor": float(high),
        "original_max_positions": int(positions),
    }


def _layer_types(fields: _Fields, spec: ModelSupportSpec, layers: int) -> tuple[LayerKind, ...]:
    listed = fields.get("layer_types")
    if listed is None:
        every = fields.integer("full_attention_interval", spec.traits.full_attention_interval)
        listed = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if not isinstance(listed, list) or not all(isinstance(kind, str) for kind in listed):
        raise fields.fail(f"layer_types is {listed!r}, expected a list of names")
    if len(listed) != layers:
        raise fields.fail(f"layer_types has {len(listed)} entries for num_hidden_layers {layers}")
    alien = sorted(set(listed) - set(spec.traits.layer_kinds))
    if alien:
        raise fields.fail(
            f"layer_types contains {', '.join(alien)}; {spec.key} knows {', '.join(spec.traits.layer_kinds)}"
        )
    return tuple(next(kind for kind in spec.traits.layer_kinds if kind == name) for name in listed)


def _moe_layers(fields: _Fields, spec: ModelSupportSpec, layers: int) -> tuple[bool, ...]:
    if not spec.is_moe:
        if fields.get("num_experts", fields.get("num_local_experts")):
            raise fields.fail(f"the config has experts, but {spec.key} is dense")
        return (False,) * layers
    step, dense = fields.integer("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(not isinstance(i, int) or not 0 <= i < layers for i in dense):
        raise fields.fail(f"mlp_only_layers is {dense!r}, expected layer numbers below {layers}")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def _expert_sizes(fields: _Fields, spec: ModelSupportSpec) -> dict[str, Any]:
    experts = fields.count("num_experts", fields.get("num_local_experts"))
    if experts != fields.get("num_local_experts", experts):
        raise fields.fail(f"num_experts is {experts}, but num_local_experts is {fields.get('num_local_experts')}")
    chosen = fields.integer("num_experts_per_tok")
    if chosen > experts:
        raise fields.fail(f"num_experts_per_tok {chosen} exceeds num_experts {experts}")
    always = spec.traits.norm_topk_prob
    normalised = fields.flag("norm_topk_prob", bool(always))
    if always is not None and normalised is not always:
        raise fields.fail(f"norm_topk_prob is {normalised}, but {spec.key} always computes {always}")
    return {
        "experts": experts,
        "experts_per_token": chosen,
        "expert_size": fields.integer("moe_intermediate_size"),
        "shared_expert_size": fields.integer("shared_expert_intermediate_size", 0, least=0),
        "norm_topk_prob": normalised,
    }


def _linear_sizes(fields: _Fields) -> dict[str, Any]:
    key, value = map(fields.count, ("linear_num_key_heads", "linear_num_value_heads"))
    if value % key:
        raise fields.fail(f"linear_num_value_heads {value} is no multiple of linear_num_key_heads {key}")
    return {
        "linear_key_heads": key,
        "linear_value_heads": value,
        "linear_key_dim": fields.integer("linear_key_head_dim"),
        "linear_value_dim": fields.integer("linear_value_head_dim"),
        "conv_kernel": fields.integer("linear_conv_kernel_dim"),
    }


def _token_ids(fields: _Fields, name: str) -> tuple[int, ...]:
    # The outer level of a multimodal config may name another end token than the text model; both
    # end a text.
    tokens: list[int] = []
    for level in (fields.text, fields.outer):
        value = level.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and token not in tokens:
                tokens.append(token)
    if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in tokens):
        raise fields.fail(f"{name} is {fields.text.get(name)!r}, expected token ids")
    return tuple(tokens)


def _mtp_layers(fields: _Fields) -> int:
    levels = (fields.text, fields.outer)
    counts = {level[name] for level in levels for name in MTP_FIELDS if level.get(name) is not None}
    if len(counts) > 1:
        raise fields.fail(
            f"the config counts its multi-token-prediction layers as {sorted(counts)}; make the fields agree"
        )
    count = counts.pop() if counts else 0
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise fields.fail(f"{' / '.join(MTP_FIELDS)} is {count!r}, expected a number of layers")
    return count


def _unknown_fields(fields: _Fields) -> tuple[str, ...]:
    """Fields that nobody reads and that are not switched off (null, false, zero, empty)."""
    levels = [(fields.outer, "")] + ([(fields.text, "text_config.")] if fields.nested else [])
    return tuple(
        prefix + name
        for level, prefix in levels
        for name in sorted(level)
        if name not in READ and name not in IGNORED and level[name] not in (None, False, 0, [], {}, "")
    )


def checkpoint_dtype(folder: Path | str) -> Literal["float32", "bfloat16"]:
    """The dtype in a checkpoint's `config.json`: "bfloat16" or "float32".

    Raises ConfigError for none, and for a dtype without training.
    """
    raw = read_json(Path(folder))
    text = raw.get("text_config") or {}
    name = next((layer[key] for layer in (text, raw) for key in ("dtype", "torch_dtype") if layer.get(key)), None)
    if name not in ("float32", "bfloat16"):
        raise ConfigError(
            f"{folder}: config.json names dtype {name!r}; set dtype to 'bfloat16' or 'float32' (of the backend, or as --dtype)"
        )
    return name
