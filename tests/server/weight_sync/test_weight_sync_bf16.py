"""Merged weights of the GatedDeltaNet families, which vLLM serves on a CPU in bf16 only.

How much bf16 alone may move a log-probability is measured here, on the same tokens and weights: Hugging Face in bf16 against Hugging Face
in fp32. A mixture is compared on the experts that the server used, so that a router's near-ties can't hide a wrong expert.

Shapes: S tokens, L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter

import numpy as np
import pytest
import torch

from lockstep.backends.megatron.plan.settings import routed_experts_shape
from lockstep.batching.routed_experts import RoutedExpertsShape, decode_routed_experts
from lockstep.engine.weight_sync.buckets import describe
from lockstep.engine.weight_sync.plan import make_plan
from lockstep.engine.weight_sync.sender import Endpoint, WeightPusher
from lockstep.inference.launch import ServerConfig, launch
from lockstep.models.registry import load_model_config
from lockstep.models.tiny.write import write_tiny
from lockstep_wire.transports.gloo import GlooSender
from sync_driver import apart, change, checkpoint_weights, hf_logprobs, load, on_experts

pytestmark = [pytest.mark.server, pytest.mark.slow]

TOKENS = torch.randint(3, 320, (96,), generator=torch.Generator().manual_seed(9)).tolist()
ROOM = 2.0
"""What the server may differ by, in units of bf16's own noise: its kernels round elsewhere than Hugging Face's. Measured: 0.7 to 1.1 of
the noise, which is a mean of 0.011 to 0.016 nats here; two experts in each other's place give 16 times the noise.
"""


async def served(server, name: str, shape: RoutedExpertsShape | None) -> tuple[list[float], np.ndarray | None]:
    """The server's log-probabilities and, for a mixture, its routed experts [S, L, K]."""
    values, choice = await server.score_choice(name, TOKENS)
    if shape is None:
        return values, None
    given = (choice["routed_experts"], choice["routed_experts_digest"], choice["prompt_token_ids"], choice["token_ids"])
    return values, decode_routed_experts(*given, shape, name)[: len(TOKENS)]


def reference(model, experts_SLK: np.ndarray | None) -> tuple[list[float], dict[str, float]]:
    """Hugging Face's log-probabilities in fp32, and what bf16 moves them by: the limits for the server."""
    with on_experts(model, experts_SLK):
        exact = hf_logprobs(model, TOKENS)
    rounded = copy.deepcopy(model).bfloat16()
    with on_experts(rounded, experts_SLK):
        noise = (hf_logprobs(rounded, TOKENS) - exact).abs()
    return exact.tolist(), {"largest": ROOM * float(noise.max()), "mean": ROOM * float(noise.mean())}


def with_two_experts_exchanged(model, experts_SLK: np.ndarray):
    """The model with the output matrices of one layer's two busiest experts in each other's place."""
    wrong = copy.deepcopy(model)
    layer = experts_SLK.shape[1] // 2
    (a, _), (b, _) = Counter(experts_SLK[:, layer].flatten().tolist()).most_common(2)
    matrices = wrong.model.layers[layer].mlp.experts.down_proj
    with torch.no_grad():
        matrices[[a, b]] = matrices[[b, a]]
    return wrong


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
async def test_three_random_steps(runtime, tmp_path, family):
    folder = write_tiny(family, tmp_path / family, seed=5)
    model, shape = load(folder), routed_experts_shape(load_model_config(str(folder)))
    config = ServerConfig(
        model=folder,
        served_name="policy@0",
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        threads=1,
        capture_routed_experts=shape is not None,
    )
    server = await launch(config, runtime, tmp_path / "run")
    try:
        plan = make_plan(describe(checkpoint_weights(model, folder)), bucket_bytes=200_000)
        pusher = WeightPusher(Endpoint(server.root_url, server.api_key), GlooSender(90.0), plan, deadline_s=200.0)

        async def push(what, name):
            await asyncio.to_thread(pusher.push, checkpoint_weights(what, folder), name, name)
            return await served(server, name, shape)

        experts_SLK = None
        for step in (1, 2, 3):
            before = hf_logprobs(model, TOKENS).tolist()
            change(model, step, scale=0.3)
            values, experts_SLK = await push(model, f"policy@{step}")
            exact, limits = reference(model, experts_SLK)
            assert not apart(values, exact, **limits), step
            assert apart(values, before, **limits), step  # the weights of before are far outside
        if experts_SLK is not None:
            values, experts_SLK = await push(with_two_experts_exchanged(model, experts_SLK), "policy@wrong")
            exact, limits = reference(model, experts_SLK)
            assert apart(values, exact, **limits)
        pusher.close()
    finally:
        await server.close()
