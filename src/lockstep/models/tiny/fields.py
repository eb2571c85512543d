"""The contents of a family's `tiny.py`: the transformers class of its tiny model and the fields of
its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TinyModel:
    """A tiny model is named like its family's spec. `fields` uses the names of `config.json`.

    float32: ends of the names of tensors that the family's releases store in fp32, whatever the
        others' dtype.
    on_gpu: fields that replace those where GPU kernels are checked: the releases' head sizes and
        dtype, since kernels are made for each.
    """

    architecture: str
    fields: Mapping[str, Any]
    float32: tuple[str, ...] = ()
    on_gpu: Mapping[str, Any] = field(default_factory=lambda: {**GPU, "head_dim": 128})


COMMON: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
GPU: Mapping[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "dtype": "bfloat16"}
EXPERTS: Mapping[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
