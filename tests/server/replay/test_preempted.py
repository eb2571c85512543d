"""Requests that vLLM preempts and computes again: their routed experts come back complete and
right, or the choice is an error with its name.

Shape suffixes: S tokens, L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

import asyncio
import random
import re

import numpy as np
import pytest
import torch

from lockstep.batching.routed_experts import decode_routed_experts
from lockstep.errors import DataError
from lockstep.inference.launch import ServerConfig, launch
from lockstep.models.tiny.write import write_tiny
from lockstep.testing.in_flight import counted
from replaying import SHAPE

pytestmark = [pytest.mark.server, pytest.mark.slow]
REQUESTS, PROMPT, SAMPLED = 6, 40, 110
LOST = r"request \d has (no routed experts for|routed experts for \d+ of \d+ tokens: \d+ are lost in) tokens 0 to \d+"
"""What the trainer says of a choice with fewer rows than tokens."""


async def sample(server, number):
    """(ids, sampled log-probabilities, routed experts [S, L, K] or the error that they are)."""
    body = {"model": "base", "prompt": [random.randrange(3, 320) for _ in range(PROMPT)], "max_tokens": SAMPLED}
    reply = await server.call("POST", "/v1/completions", body | {"ignore_eos": True}, deadline_s=600)
    choice = reply.json()["choices"][0]
    ids, sampled = choice["prompt_token_ids"], choice["token_ids"]
    name = f"request {number}"
    try:
        rows = decode_routed_experts(
            choice["routed_experts"], choice["routed_experts_digest"], ids, sampled, SHAPE, name
        )
    except DataError as error:
        rows = error
    return ids + sampled, choice["logprobs"]["token_logprobs"], rows


async def test_routed_experts_survive_or_are_named(runtime, tmp_path):
    """Six requests of 150 tokens in room for two thirds of them."""
    base = write_tiny("qwen3_moe", tmp_path / "model", seed=random.randrange(1000))
    config = ServerConfig(
        model=base,
        served_name="base",
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        capture_routed_experts=True,
        threads=1,
        extra_args=("--block-size", "32", "--num-gpu-blocks-override", "20"),
    )
    server = await launch(config, runtime, tmp_path / "run")
    try:
        replies = await asyncio.gather(*(sample(server, number) for number in range(REQUESTS)))
        assert await counted(server, "num_preemptions_total") > 0
    finally:
        await server.close()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    complete = 0
    for ids, logprobs, rows in replies:
        if isinstance(rows, DataError):
            assert re.fullmatch(rf"{LOST}.*", str(rows))
            continue
        complete += 1
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_router_logits=True)
        expected_SLK = torch.stack([layer.topk(SHAPE.top_k).indices for layer in out.router_logits], 1).numpy()
        np.testing.assert_array_equal(rows, expected_SLK[: len(rows)])
        chosen = out.logits.log_softmax(-1)[0, :-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        np.testing.assert_allclose(logprobs, chosen[-SAMPLED:].numpy(), atol=2e-5)
    assert complete > 0
