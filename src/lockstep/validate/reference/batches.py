"""Random sequences that branch, packed as a training step packs them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lockstep.batching.pack import pack
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.models.config import ModelConfig

VOCABULARY = 200
"""Ids below this exist in every model."""


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
    """Two turns: a shared prompt, replies that branch, a second turn that branches from some of
    them.
    """
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
    """The sequences as rows of `row_length` tokens, with random advantages and weights.

    share False: one node for each sequence.
    """
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


def with_random_experts(batch: PackedBatch, config: ModelConfig, seed: int) -> PackedBatch:
    """The batch with random routed experts, which no router would choose. A dense model's stays as
    it is.
    """
    if not config.is_moe:
        return batch
    shape = (*batch.tokens_RS.shape, sum(config.moe_layers))
    choices = np.argsort(np.random.default_rng(seed).random((*shape, config.experts)), axis=-1)
    kind = np.uint8 if config.experts <= 256 else np.uint16
    return replace(batch, experts_RSLK=choices[..., : config.experts_per_token].astype(kind))
