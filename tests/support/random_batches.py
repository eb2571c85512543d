"""Random rollouts for tests: token sequences that share prefixes as trees do, and trajectories as a server would return
them.

Shape suffix: S tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from openai.types.chat.chat_completion import Choice

from lockstep.batching.prefix_tree import TokenSequence
from lockstep.rollouts.trajectory import Trajectory


def random_sequences(
    random: np.random.Generator,
    leaves: int,
    depth: int = 4,
    longest: int = 6,
    vocabulary: int = 30,
    routed_experts: tuple[int, int, int] | None = None,
) -> list[TokenSequence]:
    """`leaves` sequences made by branching off earlier ones at random points, inside and outside of sampled spans.

    What a sequence takes over it takes whole: ids, loss mask (sometimes forgotten: context there), logprobs,
    temperature, routed experts.
    routed experts: (layers, top_k, experts) of a mixture-of-experts model.
    """
    sequences: list[TokenSequence] = []
    for number in range(leaves):
        start = None
        if sequences and random.random() < 0.9:
            parent = sequences[int(random.integers(len(sequences)))]
            start = parent.cut(int(random.integers(1, len(parent) + 1)))
        spans = int(random.integers(1, depth + 1))
        sequences.append(_grow(random, f"sequence {number}", start, spans, longest, vocabulary, routed_experts))
    return sequences


def _grow(
    random: np.random.Generator,
    name: str,
    start: TokenSequence | None,
    spans: int,
    longest: int,
    vocabulary: int,
    routed_experts: tuple[int, int, int] | None,
) -> TokenSequence:
    tokens, mask, logprobs, temperatures, routed = [], [], [], [], []
    if start is not None:
        tokens, mask = start.tokens_S.tolist(), start.loss_mask_S.tolist()
        logprobs, temperatures = start.logprobs_S.tolist(), start.temperatures_S.tolist()
        routed = [] if start.experts_SLK is None else list(start.experts_SLK)
        if random.random() < 0.3:  # a history that this sequence does not train on
            mask, logprobs, temperatures = [False] * len(mask), [np.nan] * len(mask), [1.0] * len(mask)
    for span in range(spans):
        sampled = bool(tokens) and (random.random() < 0.5 or span == spans - 1)
        size = int(random.integers(1, longest + 1))
        temperature = float(random.choice([0.7, 1.0, 1.3]))
        for _ in range(size):
            tokens.append(int(random.integers(vocabulary)))
            mask.append(sampled)
            logprobs.append(float(np.float32(-random.exponential())) if sampled else np.nan)
            temperatures.append(temperature if sampled else 1.0)
            if routed_experts is not None:
                layers, top_k, experts = routed_experts
                routed.append(np.stack([random.permutation(experts)[:top_k] for _ in range(layers)]))
    return TokenSequence(
        name,
        np.array(tokens, dtype=np.int32),
        np.array(mask, dtype=bool),
        np.array(logprobs, dtype=np.float32),
        np.array(temperatures, dtype=np.float32),
        None if routed_experts is None else np.stack(routed).astype(np.uint8),
        None if routed_experts is None else np.arange(len(tokens)) < len(tokens) - 1,
    )


seeds = st.integers(0, 2**32 - 1)


def choice(
    prompt: list[int],
    sampled: list[int],
    *,
    version: str = "m@0",
    sampling: dict[str, Any] | None = None,
    logprobs: list[float] | None = None,
    openai_logprobs: bool = False,
    **extra: Any,
) -> Choice:
    """A choice as the server returns it; with `openai_logprobs`, to a client that asked for logprobs."""
    logprobs = [-0.5 - 0.01 * k for k in range(len(sampled))] if logprobs is None else logprobs
    fields = {
        "finish_reason": "stop",
        "index": 0,
        "message": {"role": "assistant", "content": " ".join(map(str, sampled))},
        "logprobs": None,
        "prompt_token_ids": prompt,
        "token_ids": sampled,
        "weight_versions": [{"version": version, "start": 0, "end": len(sampled)}],
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | (sampling or {}),
    }
    if openai_logprobs:
        content = [
            {"token": f"t{token}", "bytes": [token % 256], "logprob": value, "top_logprobs": []}
            for token, value in zip(sampled, logprobs, strict=False)
        ]
        fields["logprobs"] = {"content": content, "refusal": None}
    else:
        fields["sampled_logprobs"] = logprobs
    return Choice.model_validate(fields | extra)


def trajectory(*choices: Choice, reward: float = 1.0) -> Trajectory:
    return Trajectory(messages_and_choices=[{"role": "user", "content": "?"}, *choices], reward=reward)
