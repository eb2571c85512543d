"""Merged weights of the GatedDeltaNet families, which vLLM serves on a CPU in bf16 only."""

from __future__ import annotations

import asyncio

import pytest
import torch
from sync_driver import change, checkpoint_weights, hf_logprobs, load

from lockstep.errors import MismatchError
from lockstep.families.tiny import write_tiny
from lockstep.serving.launch import ServerConfig, launch
from lockstep.sync.export import describe
from lockstep.sync.plan import make_plan
from lockstep.sync.proof import BF16_MEAN_TOLERANCE, BF16_TOLERANCE, check_probe
from lockstep.sync.push import Endpoint, WeightPusher
from lockstep.sync.transports import GlooTransport

pytestmark = [pytest.mark.server, pytest.mark.slow]

TOKENS = torch.randint(3, 320, (96,), generator=torch.Generator().manual_seed(9)).tolist()


# A router in bf16 now and then picks another expert than one in fp32, which moves single tokens by much.
LIMITS = {
    "qwen3_5": {"largest": BF16_TOLERANCE, "mean": BF16_MEAN_TOLERANCE},
    "qwen3_5_moe": {"largest": 1.5, "mean": 0.1},
}


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
async def test_three_random_steps(runtime, tmp_path, family):
    folder = write_tiny(family, tmp_path / family, seed=5)
    model = load(folder)
    config = ServerConfig(
        model=folder, served_name="policy@0", dtype="bfloat16", max_model_len=256, max_num_seqs=4, threads=1
    )
    server = await launch(config, runtime, tmp_path / "run")
    try:
        plan = make_plan(describe(checkpoint_weights(model, folder)), bucket_bytes=200_000)
        pusher = WeightPusher(Endpoint(server.root_url, server.api_key), GlooTransport(90.0), plan, deadline_s=200.0)
        for step in (1, 2, 3):
            before = hf_logprobs(model, TOKENS).tolist()
            change(model, step, scale=0.3)
            name = f"policy@{step}"
            await asyncio.to_thread(pusher.push, checkpoint_weights(model, folder), name, name)
            served = await server.score(name, TOKENS)
            check_probe(served, hf_logprobs(model, TOKENS).tolist(), name, **LIMITS[family])
            with pytest.raises(MismatchError):  # the weights of before are far outside
                check_probe(served, before, name, **LIMITS[family])
        pusher.close()
    finally:
        await server.close()
