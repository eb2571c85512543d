"""Weights from GPU 0 into a real server on GPU 1, over NCCL: staged and streamed, the direct path, and a sender that stalls."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from lockstep.engine.weight_sync.buckets import describe
from lockstep.engine.weight_sync.plan import make_plan
from lockstep.engine.weight_sync.sender import Endpoint, WeightPusher
from lockstep.engine.weight_sync.transports import make_transport
from lockstep.errors import ServerError
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.launch import ServerConfig, launch
from lockstep.models.tiny.write import write_tiny
from sync_driver import apart, change, checkpoint_weights, hf_logprobs, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, one for each side"),
]

TOKENS = torch.randint(3, 320, (96,), generator=torch.Generator().manual_seed(2)).tolist()
# A router in bf16 now and then picks another expert than one in fp32, which moves single tokens by much.
LIMITS = {"largest": 1.5, "mean": 0.1}


def on_gpu(model, folder):
    return [(name, weight.to("cuda:0", torch.bfloat16)) for name, weight in checkpoint_weights(model, folder)]


async def test_steps_over_nccl(tmp_path):
    folder = write_tiny("qwen3_moe", tmp_path / "model", seed=5, overrides={"head_dim": 64})
    model = load(folder)
    config = ServerConfig(
        model=folder,
        served_name="policy@0",
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=8,
        gpus=(1,),
        gpu_memory_utilization=0.3,
        extra_args=("--enforce-eager",),
    )
    server = await launch(config, find_runtime("cuda"), tmp_path / "run")
    endpoint = Endpoint(server.root_url, server.api_key)
    plan = make_plan(describe(on_gpu(model, folder)), bucket_bytes=200_000)

    def pusher(policy, deadline_s=60.0):
        carrier = make_transport("nccl", deadline_s)
        return WeightPusher(endpoint, carrier, plan, device="cuda:0", deadline_s=60.0, policy=policy)

    async def served(name):
        return await server.score(name, TOKENS)

    try:
        senders = {policy: pusher(policy) for policy in ("staged", "streamed")}
        paths = []
        for step, policy in enumerate(["staged", "staged", "staged", "streamed", "streamed"], 1):
            before = hf_logprobs(model, TOKENS).tolist()
            change(model, step, scale=0.3)
            name = f"policy@{step}"
            report = await asyncio.to_thread(senders[policy].push, on_gpu(model, folder), name, name)
            paths.append((report.policy, report.path))
            assert not apart(await served(name), hf_logprobs(model, TOKENS).tolist(), **LIMITS)
            assert max(abs(a - b) for a, b in zip(before, await served(name), strict=True)) > 0.1
        assert paths == [("staged", "load_weights"), *[("staged", "direct")] * 2, *[("streamed", "direct")] * 2]
        for sender in senders.values():
            sender.close()
        over, weights = threading.Event(), on_gpu(model, folder)

        def stalling():
            for number, weight in enumerate(weights):
                if number == len(weights) - 1:
                    over.wait(10.0)
                yield weight

        slow = pusher("staged", deadline_s=3.0)
        with pytest.raises(ServerError, match=plan.buckets[-1].slots[0].meta.name):
            await asyncio.to_thread(slow.push, stalling(), "policy@late", "policy@late")
        assert not apart(await served("policy@5"), hf_logprobs(model, TOKENS).tolist(), **LIMITS)
        again = pusher("auto")
        await asyncio.to_thread(again.push, weights, "policy@6", "policy@6")
        assert not apart(await served("policy@6"), hf_logprobs(model, TOKENS).tolist(), **LIMITS)
        again.close()
    finally:
        await server.close()
