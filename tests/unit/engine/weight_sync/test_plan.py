"""Plans, buckets and digests: plain properties, no server."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.weight_sync.buckets import BucketFiller, describe
from lockstep.engine.weight_sync.plan import ALIGNMENT, Part, Source, SyncPlan, make_plan, plan_sources
from lockstep.errors import WeightsError
from lockstep_wire import plan as wire
from lockstep_wire.digest import digest
from lockstep_wire.plan import TensorMeta

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])
SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)
WHOLE = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@st.composite
def streams(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = []
    for index in range(draw(st.integers(0, 12))):
        numbers = torch.randint(0, 256, (*draw(SHAPES),), generator=generator)
        made.append((f"layer.{index}.weight", numbers.to(draw(DTYPES))))
    return made


@settings(deadline=None)
@given(tensors=streams(), bucket_bytes=st.integers(1, 600))
def test_what_is_filled_in_comes_out_of_the_buckets(tensors, bucket_bytes):
    plan = make_plan(describe(tensors), bucket_bytes)
    filler = BucketFiller(plan)
    for _ in range(2):  # buffers are used again
        out = {name: torch.full_like(tensor, 77) for name, tensor in tensors}
        for _, bucket, bytes_N in filler.fill(tensors):
            rows = [slot for slot in bucket.slots if slot.nbytes > bucket_bytes]
            assert bucket.nbytes <= bucket_bytes or (len(bucket.slots) == 1 and len(rows) == 1)
            stop = 0
            for block in bucket.blocks:
                assert block.offset % ALIGNMENT == 0
            for slot in bucket.slots:
                assert slot.offset >= stop
                stop = slot.offset + slot.nbytes
                out[slot.meta.name][tuple(slice(*pair) for pair in slot.box)] = slot.view(bytes_N)
            assert bucket.nbytes == stop
        assert all(torch.equal(out[name], tensor) for name, tensor in tensors)
    described = SyncPlan((plan,)).to_json()
    assert described == SyncPlan((make_plan(describe(tensors), bucket_bytes),)).to_json()
    receiver = wire.parse(json.loads(json.dumps(described)))
    assert receiver.nbytes == sum(bucket.nbytes for bucket in plan.buckets)


@settings(deadline=None)
@given(data=st.data(), bucket_bytes=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_parts_of_several_senders_make_the_weights_whole(data, bucket_bytes, seed):
    """Weights cut into boxes at random, held by random senders, some boxes next to each other in one source."""
    generator = torch.Generator().manual_seed(seed)
    senders = data.draw(st.integers(1, 3))
    weights = {f"w{i}": torch.randn(data.draw(WHOLE), generator=generator) for i in range(data.draw(st.integers(1, 4)))}
    sources, sender_tensors = [[] for _ in range(senders)], [[] for _ in range(senders)]
    for name, weight in weights.items():
        meta = TensorMeta(name, weight.dtype, tuple(weight.shape))
        axis = data.draw(st.integers(0, weight.dim() - 1))
        cut = data.draw(st.integers(1, weight.shape[axis]))
        for low in range(0, weight.shape[axis], cut):
            box = list(meta.full_box)
            box[axis] = (low, min(weight.shape[axis], low + cut))
            part = weight[tuple(slice(*pair) for pair in box)]
            first = next((i for i, (a, b) in enumerate(box) if b - a > 1), 0)
            rows = part.shape[first]
            owner, key = data.draw(st.integers(0, senders - 1)), f"{name}.{low}"
            padding = data.draw(st.integers(0, 2))  # rows that don't travel
            block = torch.cat([torch.zeros(padding, part.numel() // rows), part.reshape(rows, -1)])
            piece = Part(meta, tuple(box), padding, rows)
            sources[owner].append(Source(key, weight.dtype, len(block), block.shape[1], (piece,)))
            sender_tensors[owner].append((key, block))
    plan = SyncPlan(tuple(plan_sources(piece, bucket_bytes) for piece in sources))
    parsed = wire.parse(json.loads(json.dumps(plan.to_json())))
    bytes_of = {}
    for sender, (piece, tensors) in enumerate(zip(plan.senders, sender_tensors, strict=True)):
        for index, _, bytes_N in BucketFiller(piece).fill(tensors):
            bytes_of[sender, index] = bytes_N.clone()
    buffers = [bytes_of[bucket.sender, bucket.index] for bucket in parsed.buckets]
    assembled = dict(wire.assemble(parsed, buffers))
    assert set(assembled) == set(weights)
    assert all(torch.equal(assembled[name], weight) for name, weight in weights.items())
    if len(plan.senders[-1].buckets) and senders > 1:
        with pytest.raises(ValueError, match="a sender is missing"):
            wire.parse(SyncPlan(plan.senders[:-1]).to_json() | {"senders": dropped_part(plan)})
    with pytest.raises(WeightsError, match="twice in a sync"):
        SyncPlan((*plan.senders, max(plan.senders, key=lambda piece: piece.nbytes)))


def dropped_part(plan):
    """A plan whose last sender has lost a slot of a weight that has others, or half of its only one."""
    described = plan.to_json()["senders"]
    slot = described[-1][-1]["slots"][-1]
    slot[4] = [list(pair) for pair in (slot[4] or [[0, size] for size in slot[2]])]
    slot[4][-1][1] = slot[4][-1][0]
    return described


def test_a_stream_that_is_not_the_plans_is_refused():
    good = [("a", torch.zeros(3)), ("b", torch.zeros(2, 2)), ("c", torch.zeros(1, dtype=torch.bfloat16))]
    filler = BucketFiller(make_plan(describe(good)))
    bad = [
        (good[:2], "end before 'c'"),
        ([*good, ("d", torch.zeros(1))], "'d'"),
        ([good[1], good[0], good[2]], "expected 'a'"),
        ([("a", torch.zeros(4)), *good[1:]], r"got 'a' \(4,\)"),
        ([good[0], ("b", torch.zeros(4)), good[2]], r"got 'b' \(4,\)"),
        ([*good[:2], ("c", torch.zeros(1))], r"torch\.float32"),
    ]
    for stream, match in bad:
        with pytest.raises(WeightsError, match=match):
            list(filler.fill(stream))
    with pytest.raises(WeightsError, match="twice in a sync: b"):
        SyncPlan((make_plan(describe([*good, good[1]])),))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**20), data=st.data())
def test_a_digest_sees_one_bit_a_swap_and_the_bucket(size, seed, data):
    bytes_N = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    index = seed % 100
    original = digest(bytes_N, index)
    assert original == digest(bytes_N.clone(), index)
    assert original != digest(bytes_N, index + 1) or not bytes_N.any()
    changed = bytes_N.clone()
    changed[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(changed, index) != original
    if size >= 16 and not torch.equal(bytes_N[:8], bytes_N[8:16]):
        swapped = bytes_N.clone()
        swapped[:8], swapped[8:16] = bytes_N[8:16], bytes_N[:8]
        assert digest(swapped, index) != original


def test_a_digest_does_not_depend_on_how_it_is_cut(monkeypatch):
    bytes_N = torch.randint(0, 256, (1003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    uncut = digest(bytes_N, 5)
    monkeypatch.setattr("lockstep_wire.digest._CHUNK_WORDS", 7)
    assert digest(bytes_N, 5) == uncut
