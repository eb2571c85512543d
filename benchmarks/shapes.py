"""Shapes of released models, and a fast way to write a checkpoint of such a shape with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

QWEN3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_position_embeddings": 40960}
QWEN3_5 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}}
MOE = {"norm_topk_prob": True, "num_experts_per_tok": 8}


def _sizes(
    hidden: int, layers: int, heads: int, kv: int, dim: int, vocabulary: int, tied: bool = False
) -> dict[str, Any]:
    return {
        **{"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv},
        **{"head_dim": dim, "vocab_size": vocabulary, "tie_word_embeddings": tied, "dtype": "bfloat16"},
    }


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": ("Qwen3Config", {**QWEN3, **_sizes(1024, 28, 16, 8, 128, 151936, True), "intermediate_size": 3072}),
    "qwen3-8b": ("Qwen3Config", {**QWEN3, **_sizes(4096, 36, 32, 8, 128, 151936), "intermediate_size": 12288}),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {**QWEN3, **MOE, **_sizes(2048, 48, 32, 4, 128, 151936), "num_experts": 128, "moe_intermediate_size": 768},
    ),
    "qwen3.5-9b": ("Qwen3_5TextConfig", QWEN3_5),
    "qwen3.5-35b-a3b": ("Qwen3_5MoeTextConfig", QWEN3_5),
}
"""Name: (transformers' config class, its fields)."""

_SHARD_BYTES = 4 * 2**30


DECIDED = {
    **{"mlp.gate.weight": 4.0, "shared_expert_gate.weight": 2.0, "embed_tokens.weight": 45.0, "lm_head.weight": 1.5},
    **{"o_proj.weight": 0.5, "out_proj.weight": 0.5, "down_proj.weight": 0.5, "experts.down_proj": 0.5},
}
"""Gains under which a random model's routing is not flat, and its layers don't drown in each other's noise. The last of eight experts has
2% of their weight, so that a pick that flips changes little: for what compares two programs and does not replay.
"""
ROUTED = DECIDED | {"mlp.gate.weight": 2.0, "down_proj.weight": 1.0, "experts.down_proj": 1.0}
"""As above, and a pick that flips matters: the first of eight experts has 35% of their weight, the last one 5%, all eight 37% of the
router's probability (3% were flat), and experts are not scaled down.
"""


def write_random(
    shape: str, folder: Path, overrides: dict[str, Any] | None = None, gains: dict[str, float] | None = None
) -> Path:
    """A bf16 checkpoint of `shape` with random weights, drawn on the GPU if there is one; nothing is done if it is
    there already. gains: by a matrix's last names, its standard deviation times the root of its fan-in, 1 for the others.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    from lockstep.models.checkpoint.read import expected_tensors
    from lockstep.models.contract import Layout
    from lockstep.models.registry import get_model_support_handler, load_model_config

    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    kind, fields = SHAPES[shape]
    config = getattr(transformers, kind)(**fields | (overrides or {}))
    config.architectures = [kind.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    handler, model = get_model_support_handler(str(folder)), load_model_config(folder)
    tensors = expected_tensors(handler, model, Layout())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}
    part: dict[str, Any] = {}
    size = 0

    def flush() -> None:
        nonlocal part, size
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
        part, size = {}, 0

    for name, dims in sorted(tensors.items()):
        gain = next((gain for ending, gain in (gains or {}).items() if name.endswith(ending)), 1.0)
        scale = gain / math.sqrt(dims[-1]) if len(dims) > 1 else 0.1
        values = torch.randn(dims, device=device, dtype=torch.bfloat16, generator=generator) * scale
        if len(dims) == 1 and "norm" in name and not model.zero_centered_norm:
            values += 1
        part[name] = values.cpu()
        size += values.numel() * 2
        if size > _SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": sum(math.prod(dims) * 2 for dims in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
