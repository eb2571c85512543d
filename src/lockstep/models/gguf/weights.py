"""A GGUF file's architecture in Hugging Face terms: its config, and the name of each tensor.

Every metadata key of the architecture is read or known to change nothing. Any other key is refused,
since a model that ignored it would compute something else. The names of keys and tensors are
llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.errors import UnsupportedModelError, WeightsError
from lockstep.models.gguf.file import GgufFile, weights


@dataclass(frozen=True)
class _Architecture:
    """config: transformers' class.
    paired: llama.cpp's converter deals each head's query and key rows in pairs.
    """

    config: str
    model: str
    moe: bool = False
    paired: bool = False


ARCHITECTURES = {
    "llama": _Architecture("LlamaConfig", "LlamaForCausalLM", paired=True),
    "qwen3": _Architecture("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3moe": _Architecture("Qwen3MoeConfig", "Qwen3MoeForCausalLM", moe=True),
}

_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_MOE_FIELDS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_READ = {
    *(*_FIELDS, "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length"),
    *("rope.freq_base", "rope.dimension_count", "rope.scaling.type", "vocab_size"),
}
_END_TOKENS = ("eos_token_id", "eot_token_id")

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
}
_EXPERTS = {"ffn_gate_exps.weight": "gate_proj", "ffn_up_exps.weight": "up_proj", "ffn_down_exps.weight": "down_proj"}


def check_architecture(file: GgufFile) -> _Architecture:
    """The file's architecture. Raises UnsupportedModelError for one that isn't converted here, or
    for settings nobody reads.
    """
    name = file.architecture
    known = ARCHITECTURES.get(name)
    if known is None:
        raise UnsupportedModelError(
            f"{file.path} has the architecture {name!r}; import-gguf converts {', '.join(ARCHITECTURES)}"
        )
    read = _READ | set(_MOE_FIELDS if known.moe else ())
    alien = sorted(key for key in file.metadata if key.startswith(f"{name}.") and key.partition(".")[2] not in read)
    scaling = file.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise UnsupportedModelError(
            f"{file.path} scales its rotary angles, which GGUF files don't describe fully; use the release"
        )
    if alien:
        raise UnsupportedModelError(
            f"{file.path} sets {', '.join(alien)}, which import-gguf does not convert; use the release"
        )
    return known


def model_config(file: GgufFile, dtype: str) -> Any:
    """The transformers config that the metadata describe; dtype is the one the weights are stored
    in.
    """
    import transformers

    known, name = check_architecture(file), file.architecture
    fields = {theirs: file.need(f"{name}.{ours}") for ours, theirs in _FIELDS.items()}
    if known.moe:
        fields |= {theirs: file.need(f"{name}.{ours}") for ours, theirs in _MOE_FIELDS.items()}
        fields |= {"norm_topk_prob": True}
    heads = fields["num_attention_heads"]
    head_dim = file.get(f"{name}.attention.key_length", fields["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.get(f"{name}.{key}", head_dim) != head_dim:
            raise UnsupportedModelError(f"{file.path}: {name}.{key} is not the head's size {head_dim}; use the release")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise WeightsError(f"{file.path} has no token_embd.weight: download it again")
    theta = _float(file.get(f"{name}.rope.freq_base", 10000.0))
    ends = [file.get(f"tokenizer.ggml.{key}") for key in _END_TOKENS]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    return getattr(transformers, known.config)(
        **fields,
        architectures=[known.model],
        vocab_size=int(embedding.shape[-1]),  # GGUF counts dimensions from the innermost
        head_dim=head_dim,
        rms_norm_eps=_float(file.need(f"{name}.attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=file.get("tokenizer.ggml.padding_token_id"),
        dtype=dtype,
    )


def _float(value: Any) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05, where the file's fp32 reads
    9.999999747378752e-06.
    """
    return float(str(np.float32(value)))


def tensors(file: GgufFile, config: Any, on_tensor: Callable[[int, int], None]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, in fp32. Raises WeightsError for one that no name
    is known for.

    on_tensor: called with how many are done, and of how many.
    """
    known = check_architecture(file)
    for number, name in enumerate(file.tensors, 1):
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        inner = layer.group(2) if layer else ""
        prefix = f"model.layers.{layer.group(1)}." if layer else ""
        if inner in _EXPERTS and known.moe:
            for expert, matrix in enumerate(weights(file, name)):
                yield f"{prefix}mlp.experts.{expert}.{_EXPERTS[inner]}.weight", matrix
        elif inner in _LAYER or name in _OUTER:
            array = weights(file, name)
            if known.paired and inner in ("attn_q.weight", "attn_k.weight"):
                heads = config.num_attention_heads if inner == "attn_q.weight" else config.num_key_value_heads
                array = _halves(array, heads)
            yield prefix + _LAYER[inner] if layer else _OUTER[name], array
        else:
            raise WeightsError(f"{file.path}: nothing is known to become of {name}; its weights would be lost")
        on_tensor(number, len(file.tensors))


def _halves(paired: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head, from llama.cpp's order (0, d/2, 1, d/2 + 1, ...) to Hugging Face's (0, 1,
    ..., d - 1).
    """
    rows, columns = paired.shape
    if rows % (2 * heads):
        raise WeightsError(f"{rows} rows of a query or key weight are no even number for each of {heads} heads")
    return paired.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
