"""Small random checkpoints of every family: real classes, real tokenizer, real file layout, a few
hundred kilobytes.

They are for tests, quick starts and machines without a network. Weights are scaled so that logits
spread over a few nats and routers have preferences. A mapping error then shows in the logits.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import ConfigError
from lockstep.models.registry import get_model_support_spec_by_key, list_model_support_specs
from lockstep.models.tiny.fields import TinyModel
from lockstep.models.tiny.tokenizer import TOKENIZER_SIZE, save_tokenizer
from lockstep.process.scratch import make_folder

if TYPE_CHECKING:
    from torch import Generator, Tensor

_ROPE = ("rope_theta", "partial_rotary_factor")
_GAINS = {
    "embed_tokens.weight": 1.5,
    "lm_head.weight": 1.5,
    "mlp.gate.weight": 4.0,
    "shared_expert_gate.weight": 2.0,
    "o_proj.weight": 0.5,
    "out_proj.weight": 0.5,
    "down_proj.weight": 0.5,
    "experts.down_proj": 0.5,
}
"""Standard deviation of a matrix times the root of its fan-in; 1 for the others."""
_DERIVED = ("layer_types", "full_attention_interval")
"""Fields that follow from others unless they are set."""
_UNDECLARED = ("head_dim",)
"""A field that every release sets and transformers reads, but does not declare for Qwen3's mixture.
"""


@cache
def tiny_models() -> dict[str, TinyModel]:
    """Every family that has a tiny model, by name: the `TINY` of each family's `tiny.py`."""
    folders = sorted({spec.family for spec in list_model_support_specs()})
    modules = [importlib.import_module(f"lockstep.models.{folder}.tiny") for folder in folders]
    return {name: model for module in modules for name, model in module.TINY.items()}


def write_tiny(family: str, folder: Path | str, *, seed: int = 0, overrides: Mapping[str, Any] | None = None) -> Path:
    """Write a random checkpoint of `family` (one of `tiny_models()`) into a new or empty folder and
    return it.

    overrides: fields of the model's config, by their `config.json` names; `rope_theta` and
        `partial_rotary_factor` count as fields. The same seed and overrides give the same bytes.

    Raises ConfigError for an unknown family or field and for a vocabulary smaller than the
    tokenizer's.
    """
    import torch

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give a new folder")
    config, model = _built(family, overrides or {})
    make_folder(folder, "the folder of the tiny model")
    neutral = 0.0 if get_model_support_spec_by_key(family).traits.zero_centered_norm else 1.0
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_random(name, parameter, neutral, config.tie_word_embeddings, generator))
    exact = {
        name: parameter.data for name, parameter in model.named_parameters() if name.endswith(_model(family).float32)
    }
    model.to(config.dtype or torch.float32)
    for name, values in exact.items():
        model.get_parameter(name).data = values.to(torch.promote_types(values.dtype, config.dtype or torch.float32))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    _write_generation_config(folder, config)
    return folder


def _built(family: str, overrides: Mapping[str, Any]) -> tuple[Any, Any]:
    """(config, model). What transformers raises for values that make no model becomes ConfigError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = tiny_config(family, overrides)
        if config.vocab_size < TOKENIZER_SIZE:
            raise ConfigError(
                f"vocab_size {config.vocab_size} is smaller than the tiny tokenizer's {TOKENIZER_SIZE} tokens"
            )
        return config, _model_class(family)(config)
    except (StrictDataclassError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        if not overrides:
            raise
        fields = ", ".join(f"{name} = {value!r}" for name, value in overrides.items())
        raise ConfigError(f"no {family} can be made with {fields}: {' '.join(str(error).split())}") from error


def tiny_config(family: str, overrides: Mapping[str, Any]) -> Any:
    """The transformers config of a tiny model, with fields replaced.

    Raises ConfigError for an unknown family or field.
    """
    cls = _model_class(family).config_class
    # A field that transformers renamed keeps its `config.json` name as an attribute, and either may
    # be asked for.
    known = set(cls().to_dict()) | set(cls.attribute_map) | {*_ROPE, *_DERIVED, *_UNDECLARED, "dtype"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} is no field of {cls.__name__}; known: {', '.join(sorted(known))}")
    names: Mapping[str, str] = cls.attribute_map
    values = {names.get(name, name): value for name, value in (*_model(family).fields.items(), *overrides.items())}
    rope = {name: values.pop(name) for name in _ROPE if name in values}
    values["rope_parameters"] = {"rope_type": "default", **values.get("rope_parameters", {}), **rope}
    return cls(**values)


def parse_override(text: str) -> tuple[str, Any]:
    """A field of the model's config and its value, from the command line's `key=value`.

    The value is read as JSON. A value that is no JSON is a string. Raises ConfigError for a text
    without "=".
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"{text!r} is not KEY=VALUE, for example num_hidden_layers=2")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def _model(family: str) -> TinyModel:
    if family not in tiny_models():
        raise ConfigError(f"no tiny family {family!r}; known: {', '.join(tiny_models())}")
    return tiny_models()[family]


def _model_class(family: str) -> Any:
    import transformers

    return getattr(transformers, _model(family).architecture)


def _random(name: str, like: Tensor, neutral: float, tied: bool, generator: Generator) -> Tensor:
    """One parameter's values: fan-in scaled matrices, norms around their neutral value, decays from
    almost none to fast.
    """
    import torch

    def normal(scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    if name.endswith("A_log"):
        return torch.empty(like.shape).uniform_(math.log(0.01), math.log(4.0), generator=generator)
    if name.endswith("dt_bias"):
        return normal(0.5)
    if like.dim() == 1:
        return (1.0 if name.endswith("linear_attn.norm.weight") else neutral) + normal(0.1)
    # Strong embeddings, weak outputs and decided routers keep bfloat16 noise near 0.01 nats instead
    # of 0.1.
    if name.endswith("embed_tokens.weight") and not tied:
        return normal(1.0)
    gain = next((gain for suffix, gain in _GAINS.items() if name.endswith(suffix)), 1.0)
    return normal(gain / math.sqrt(like.shape[-1]))


def _write_generation_config(folder: Path, config: Any) -> None:
    # The sampling defaults of the real releases: whoever serves the model must not apply them
    # behind the trainer's back.
    values = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    values |= {"eos_token_id": [*ends, 0], "pad_token_id": config.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
