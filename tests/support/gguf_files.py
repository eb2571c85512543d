"""A Hugging Face checkpoint written as a GGUF file, the way llama.cpp's converter does: the other direction of import-gguf."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from lockstep.models.gguf.weights import _EXPERTS, _LAYER, _OUTER

_NAMES = {theirs: ours for ours, theirs in _LAYER.items()}


def write_gguf(
    folder: Path, file: Path, architecture: str, change=lambda writer: None, leave_out=(), metadata=None
) -> Path:
    """change: called with the writer before it writes, to add what doesn't belong. metadata: keys to write otherwise."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, architecture)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if architecture == "qwen3moe":
        values |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        values |= {"expert_feed_forward_length": config.moe_intermediate_size}
    for key, value in (values | (metadata or {})).items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"])
    _add_tokenizer(writer, tokenizer)
    change(writer)
    for name, array in _tensors(load_file(folder / "model.safetensors")):
        if name not in leave_out:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer, tokenizer):
    ids = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    special = set(tokenizer.all_special_tokens) | set(tokenizer.added_tokens_encoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in ids])
    writer.add_token_types([3 if token in special else 1 for token, _ in ids])
    merges = tokenizer.backend_tokenizer.to_str()
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _in_order(name):
    """Experts by number: 2 before 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _tensors(weights):
    """(GGUF name, array); the experts of a layer as one tensor."""
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    stacks: dict[str, list] = {}
    for name in sorted(weights, key=_in_order):
        array = weights[name].float().numpy()
        if name in outer:
            yield outer[name], array
            continue
        _, _, layer, inner = name.split(".", 3)
        if ".experts." in name:
            parts = inner.split(".")
            if parts[-1] == "gate_up_proj":
                gate, up = np.split(array, 2, axis=1)
                yield f"blk.{layer}.ffn_gate_exps.weight", gate
                yield f"blk.{layer}.ffn_up_exps.weight", up
            elif parts[-1] == "down_proj":
                yield f"blk.{layer}.ffn_down_exps.weight", array
            else:
                kind = next(ours for ours, theirs in _EXPERTS.items() if theirs == parts[-2])
                stacks.setdefault(f"blk.{layer}.{kind}", []).append(array)
        else:
            yield f"blk.{layer}.{_NAMES[inner]}", array
    for name, arrays in stacks.items():
        yield name, np.stack(arrays)
