"""Models, batches and references that several engine tests share.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lockstep.batching.pack import pack
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.models.tiny.write import write_tiny

VOCABULARY = 200


def tiny(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    return write_tiny(family, folder, seed=seed, overrides=overrides)


def hugging_face(folder: Path) -> Any:
    """The model in fp32 with eager-equivalent attention, from transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


class _InDouble(TorchFunctionMode):
    """Turns every cast to fp32 into one to fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def hugging_face_fp64(folder: Path) -> Any:
    """The same model in fp64, also where transformers casts to fp32; but for the rotary angles, which every release defines in fp32."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "sdpa"}
    if "num_experts" in (folder / "config.json").read_text():
        options["experts_implementation"] = "eager"  # grouped_mm has no fp64
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    rotary, model_forward = model.model.rotary_emb.forward, model.forward

    def angles(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C.DisableTorchFunction():
            cos, sin = rotary(x.float(), position_ids)
        return cos.double(), sin.double()

    def forward(ids: Tensor) -> Any:
        with _InDouble():
            return model_forward(ids)

    model.model.rotary_emb.forward, model.forward = angles, forward
    return model


def sequence(
    name: str, tokens: list[int], trained_from: int, rng: np.random.Generator, temperature: float = 1.0
) -> TokenSequence:
    """A sequence whose tokens from `trained_from` on were sampled, with made-up sampling logprobs."""
    count = len(tokens)
    mask_S = np.arange(count) >= trained_from
    logprobs_S = np.where(mask_S, -rng.uniform(2, 6, count), np.nan).astype(np.float32)
    temperatures_S = np.where(mask_S, temperature, 1.0).astype(np.float32)
    return TokenSequence(name, np.array(tokens, np.int32), mask_S, logprobs_S, temperatures_S, None, None)


def tree_sequences(rng: np.random.Generator, leaves: int = 5, temperature: float = 1.0) -> list[TokenSequence]:
    """Two turns: a shared prompt, replies that branch, a second turn that branches from some of them."""
    draw = lambda n: [int(t) for t in rng.integers(3, VOCABULARY, n)]  # noqa: E731
    prompt, sequences = draw(int(rng.integers(2, 12))), []
    for leaf in range(leaves):
        reply = draw(int(rng.integers(1, 9)))
        sequences.append(sequence(f"s{leaf}", prompt + reply, len(prompt), rng, temperature))
        if leaf % 2:
            more = prompt + reply + draw(int(rng.integers(1, 5)))
            sequences.append(sequence(f"s{leaf}b", more + draw(3), len(more), rng, temperature))
    return sequences


def batch_of(
    sequences: list[TokenSequence],
    rng: np.random.Generator,
    *,
    share: bool = True,
    row_length: int = 64,
    minibatches: int = 1,
    data: int = 1,
) -> PackedBatch:
    advantages_Q = rng.normal(size=len(sequences)).astype(np.float32)
    weights_Q = rng.uniform(0.5, 2, len(sequences)).astype(np.float32)
    return pack(
        sequences,
        advantages_Q,
        weights_Q,
        row_length=row_length,
        seed=0,
        share_prefixes=share,
        minibatches=minibatches,
        data=data,
        multiple=8,
    )


def reference_logprobs(model: Any, tokens: np.ndarray, temperatures: np.ndarray | None = None) -> Tensor:
    """[T-1] log-probability of each token after the first, by the dense computation on one unpacked sequence."""
    ids = torch.tensor(tokens, dtype=torch.long)[None]
    logits = model(ids).logits[0, :-1].float()
    if temperatures is not None:
        logits = logits / torch.tensor(temperatures[1:])[:, None]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def relative(actual: Tensor, expected: Tensor, floor: float = 1e-5) -> float:
    """Largest difference over the expected tensor's largest value, which counts at least `floor`."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=floor))
