"""Merged weights through a folder, into a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from lockstep.engine.weight_sync.buckets import describe
from lockstep.engine.weight_sync.plan import make_plan
from lockstep.engine.weight_sync.sender import Endpoint, WeightPusher
from lockstep.errors import MismatchError, ServerError
from lockstep.inference.launch import ServerConfig, launch
from lockstep_wire.transports.disk import DiskSender
from sync_driver import change, checkpoint_weights, hf_logprobs, load

pytestmark = [pytest.mark.server, pytest.mark.slow]
TOKENS = torch.randint(3, 320, (48,), generator=torch.Generator().manual_seed(6)).tolist()


@pytest.fixture
async def pushing(runtime, tiny_qwen3, tmp_path):
    """A server, the model it was started from, a pusher, and the folder that the weights go through."""
    config = ServerConfig(
        model=tiny_qwen3, served_name="policy@0", dtype="float32", max_model_len=128, max_num_seqs=4, threads=1
    )
    server, model, folder = await launch(config, runtime, tmp_path / "run"), load(tiny_qwen3), tmp_path / "weights"
    plan = make_plan(describe(checkpoint_weights(model, tiny_qwen3)), bucket_bytes=40_000)
    endpoint = Endpoint(server.root_url, server.api_key)
    pusher = WeightPusher(endpoint, DiskSender(20.0, folder), plan, deadline_s=60.0)
    yield server, model, pusher, folder
    pusher.close()
    await server.close()
    assert list(folder.iterdir()) == []


async def served(server, name: str) -> torch.Tensor:
    return torch.tensor(await server.score(name, TOKENS))


async def test_ten_random_steps_and_what_goes_wrong_on_the_way(tiny_qwen3, pushing, monkeypatch):
    server, model, pusher, folder = pushing

    async def push(name):
        await asyncio.to_thread(pusher.push, checkpoint_weights(model, tiny_qwen3), name, name)

    before = await served(server, "policy@0")
    for step in range(1, 11):
        change(model, step)
        await push(f"policy@{step}")
        after = await served(server, f"policy@{step}")
        torch.testing.assert_close(after, hf_logprobs(model, TOKENS), atol=1e-5, rtol=0)
        assert (after - before).abs().mean() > 1e-3
        before = after
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) == len(pusher._plan.senders[0].buckets)  # those of this sync, and none of the one before
    change(model, 100)
    for damage, error, match in ((torn, ServerError, "is torn"), (flipped, MismatchError, "bucket 2")):
        with monkeypatch.context() as patch:
            patch.setattr(pusher._transport, "send", damage(pusher._transport, folder))
            with pytest.raises(error, match=match):
                await push("policy@bad")
        assert await server.models() == ["policy@10"]
        assert torch.equal(await served(server, "policy@10"), before)
    await push("policy@good")
    torch.testing.assert_close(await served(server, "policy@good"), hf_logprobs(model, TOKENS), atol=1e-5, rtol=0)


def torn(transport, folder: Path):
    """The third file loses its end before the server has seen it."""
    send, count, publish = transport.send, iter(range(1000)), Path.rename

    def cut(path, target):
        path.write_bytes(path.read_bytes()[:-7])
        return publish(path, target)

    def sending(bytes_N):
        if next(count) != 2:
            send(bytes_N)
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", cut)
            send(bytes_N)

    return sending


def flipped(transport, folder: Path):
    """The third bucket is written with one bit changed."""
    send, count = transport.send, iter(range(1000))

    def sending(bytes_N):
        changed = bytes_N.clone()
        changed[11] ^= int(next(count) == 2)
        send(changed)

    return sending
