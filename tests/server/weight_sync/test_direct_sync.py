"""The direct path into a running server, staged and streamed, from two senders; and what goes wrong between them."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from lockstep.engine.weight_sync.plan import Part, Source, SyncPlan, full_source, plan_sources
from lockstep.engine.weight_sync.sender import Endpoint, WeightPusher
from lockstep.errors import LockstepError, MismatchError, ServerError, ServerLostError, TrainerError
from lockstep.inference.launch import ServerConfig, launch
from lockstep.models.tiny.write import write_tiny
from lockstep_wire.plan import TensorMeta
from lockstep_wire.transports.gloo import GlooSender
from sync_driver import change, checkpoint_weights, hf_logprobs, load

pytestmark = pytest.mark.server

TOKENS = torch.randint(3, 320, (48,), generator=torch.Generator().manual_seed(15)).tolist()


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("qwen3", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    return write_tiny(request.param, tmp_path_factory.mktemp("models") / request.param, seed=27)


@pytest.fixture(scope="module")
async def receiving(runtime, folder, tmp_path_factory):
    """A server that leaves its weights unpacked, and the trainer's model of the weights that it holds."""
    config = ServerConfig(
        model=folder,
        served_name="policy@0",
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        threads=1,
        plain_weights=True,
    )
    server = await launch(config, runtime, tmp_path_factory.mktemp("run"))
    yield server, load(folder)
    await server.close()


class Threads:
    """Two senders as threads of this process, which exchange values as the ranks of a trainer do."""

    size = 2

    def __init__(self, rank: int, shared: Threads | None = None) -> None:
        self.rank = rank
        self.values = [None, None] if shared is None else shared.values
        self.barrier = threading.Barrier(2) if shared is None else shared.barrier

    def exchange(self, value, deadline_s):
        try:
            self.values[self.rank] = value
            self.barrier.wait(deadline_s)
            values = list(self.values)
            self.barrier.wait(deadline_s)
        except threading.BrokenBarrierError:
            raise TrainerError("a sender did not come along") from None
        return values


def split(weights: list[tuple[str, torch.Tensor]]) -> tuple[SyncPlan, list[list[tuple[str, torch.Tensor]]]]:
    """Matrices by columns, the rest by turns: the plan, and what each of two senders holds."""
    sources: list[list[Source]] = [[], []]
    receiving: list[list[tuple[str, torch.Tensor]]] = [[], []]
    for number, (name, weight) in enumerate(weights):
        meta = TensorMeta(name, weight.dtype, tuple(weight.shape))
        if weight.dim() < 2 or number % 3 == 0:
            sources[number % 2].append(full_source(meta))
            receiving[number % 2].append((name, weight))
            continue
        middle = weight.shape[-1] // 2
        for sender, (low, high) in enumerate([(0, middle), (middle, weight.shape[-1])]):
            box = (*meta.full_box[:-1], (low, high))
            part = weight[..., low:high]
            rows = next(size for size in part.shape if size > 1)
            sources[sender].append(
                Source(name + "/", weight.dtype, rows, part.numel() // rows, (Part(meta, box, 0, rows),))
            )
            receiving[sender].append((name + "/", part))
    return SyncPlan(tuple(plan_sources(source, 30_000) for source in sources)), receiving


class Pair:
    """Both senders; their calls run side by side."""

    def __init__(self, server, plan: SyncPlan, policy="auto", deadline_s: float = 60.0) -> None:
        first = Threads(0)
        endpoint = Endpoint(server.root_url, server.api_key)
        self.pushers = [
            WeightPusher(endpoint, GlooSender(deadline_s), plan, deadline_s=60.0, senders=senders, policy=policy)
            for senders in (first, Threads(1, first))
        ]

    async def push(self, receiving, name: str):
        """The report; the first sender's error, unless both say the same."""
        calls = [
            asyncio.to_thread(pusher.push, tensors, name, name)
            for pusher, tensors in zip(self.pushers, receiving, strict=True)
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failed:
            assert len(failed) == 2
            assert all(isinstance(outcome, LockstepError) for outcome in failed)
            raise failed[0]
        return outcomes[0]

    def close(self) -> None:
        for pusher in self.pushers:
            pusher.close()


async def served(server, name: str) -> torch.Tensor:
    return torch.tensor(await server.score(name, TOKENS))


async def test_proven_once_then_copied_in_place(receiving, folder, monkeypatch):
    """By vLLM's own loader first; then, with the plan made once, by copies alone: into staging memory or straight in."""
    server, model = receiving
    plan, _ = split(checkpoint_weights(model, folder))
    pairs = {policy: Pair(server, plan, policy) for policy in ("auto", "streamed")}
    calls = []
    control = type(pairs["auto"].pushers[0]._control)
    call = control.call
    monkeypatch.setattr(control, "call", lambda self, *args: (calls.append(args[1]), call(self, *args))[1])
    expected = [("auto", "staged", "load_weights"), ("auto", "staged", "direct"), ("auto", "staged", "direct")]
    expected += [("streamed", "streamed", "direct"), ("streamed", "streamed", "direct")]
    for step, (asked, policy, path) in enumerate(expected, 1):
        change(model, step)
        report = await pairs[asked].push(split(checkpoint_weights(model, folder))[1], f"policy@{step}")
        assert (report.policy, report.path) == (policy, path)
        assert await server.models() == [f"policy@{step}"]
        torch.testing.assert_close(
            await served(server, f"policy@{step}"), hf_logprobs(model, TOKENS), atol=1e-5, rtol=0
        )
    # One plan for each connection, and none on the way of a sync.
    assert calls.count("/lockstep/sync/plan") == 2
    assert calls[-2:] == ["/lockstep/sync/receive", "/lockstep/sync/commit"]
    for pair in pairs.values():
        pair.close()


async def test_what_one_of_two_senders_does_wrong_leaves_the_old_version(receiving, folder, monkeypatch):
    """A stream that ends, buckets swapped between the senders, a sender that stalls: named, and nothing is changed."""
    server, model = receiving
    (name,) = await server.models()
    before = await served(server, name)
    plan, good = split(checkpoint_weights(model, folder))
    pair = Pair(server, plan, deadline_s=4.0)  # the other sender waits that long for a receiver that waits for this one

    async def fails(receiving, error, match):
        with pytest.raises(error, match=match):
            await pair.push(receiving, "policy@bad")
        assert await server.models() == [name]
        assert torch.equal(await served(server, name), before)

    await fails([good[0], good[1][:-1]], LockstepError, f"end before '{good[1][-1][0]}'")
    pair.close()
    pair = Pair(server, plan)
    sent: dict[int, torch.Tensor] = {}
    met = threading.Barrier(2)
    for sender, pusher in enumerate(pair.pushers):
        send, counter = pusher._transport.send, iter(range(10_000))

        def swapped(bytes_N, sender=sender, send=send, counter=counter):
            if next(counter) != 2:
                return send(bytes_N)
            sent[sender] = bytes_N.clone()
            met.wait(60.0)
            other, altered = sent[1 - sender], bytes_N.clone()
            altered[: min(len(altered), len(other))] = other[: len(altered)]
            return send(altered)

        monkeypatch.setattr(pusher._transport, "send", swapped)
    await fails(good, MismatchError, "bucket 2 of sender 0")
    monkeypatch.undo()
    pair.close()
    pair = Pair(server, plan, deadline_s=2.0)
    over = threading.Event()

    def stalling():
        for number, weight in enumerate(good[1]):
            if number == len(good[1]) - 1:
                over.wait(5.0)
            yield weight

    key = good[1][-1][0]
    late = next(bucket for bucket in plan.senders[1].buckets if any(block.key == key for block in bucket.blocks))
    await fails([good[0], stalling()], ServerError, f"{late.slots[0].meta.name} from sender 1")
    pair.close()
    pair = Pair(server, plan)
    await pair.push(good, "policy@good")
    assert torch.equal(await served(server, "policy@good"), before)
    pair.close()


@pytest.mark.slow
async def test_a_streamed_sync_that_breaks_ends_the_server(receiving, folder):
    """There is no old version left to serve. Comes last: the server is gone."""
    server, model = receiving
    plan, good = split(checkpoint_weights(model, folder))
    pair = Pair(server, plan, "streamed", deadline_s=10.0)
    await pair.push(good, "policy@whole")
    with pytest.raises(ServerLostError, match="restart it from the last published step"):
        await pair.push([good[0], good[1][:-1]], "policy@torn")
    pair.close()
    await asyncio.to_thread(server.child.wait, 60.0)
    with pytest.raises(ServerError, match="ended"):
        server.check_alive()
