"""Plans, buckets, digests and the probe's comparison: plain properties, no server."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import MismatchError, WeightsError
from lockstep.sync.digest import digest
from lockstep.sync.export import BucketFiller, describe
from lockstep.sync.plan import ALIGNMENT, make_plan
from lockstep.sync.proof import check_probe

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


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
        out = {}
        for _, bucket, bytes_N in filler.fill(tensors):
            assert len(bucket.slots) == 1 or bucket.nbytes <= bucket_bytes
            stop = 0
            for slot in bucket.slots:
                assert slot.offset % ALIGNMENT == 0
                assert slot.offset >= stop
                stop = slot.offset + slot.meta.nbytes
                out[slot.meta.name] = slot.view(bytes_N).clone()
            assert bucket.nbytes == stop
        assert list(out) == [name for name, _ in tensors]
        assert all(torch.equal(out[name], tensor) for name, tensor in tensors)
    assert plan.to_json() == make_plan(describe(tensors), bucket_bytes).to_json()


def test_a_stream_that_is_not_the_plans_is_refused():
    good = [("a", torch.zeros(3)), ("b", torch.zeros(2, 2)), ("c", torch.zeros(1, dtype=torch.bfloat16))]
    filler = BucketFiller(make_plan(describe(good)))
    bad = [
        (good[:2], "end before 'c'"),
        ([*good, ("d", torch.zeros(1))], "'d'"),
        ([good[1], good[0], good[2]], "name='a'"),
        ([("a", torch.zeros(4)), *good[1:]], r"shape=\(4,\)"),
        ([*good[:2], ("c", torch.zeros(1))], r"torch\.float32"),
    ]
    for stream, match in bad:
        with pytest.raises(WeightsError, match=match):
            list(filler.fill(stream))
    with pytest.raises(ValueError, match="twice in a sync: b"):
        make_plan(describe([*good, good[1]]))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**20), data=st.data())
def test_a_digest_sees_one_bit_a_swap_and_the_bucket(size, seed, data):
    bytes_N = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    index = seed % 100
    original = digest(bytes_N, index)
    assert original == digest(bytes_N.clone(), index) == receivers_digest()(bytes_N, index)
    assert original != digest(bytes_N, index + 1) or not bytes_N.any()
    changed = bytes_N.clone()
    changed[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(changed, index) != original
    if size >= 16 and not torch.equal(bytes_N[:8], bytes_N[8:16]):
        swapped = bytes_N.clone()
        swapped[:8], swapped[8:16] = bytes_N[8:16], bytes_N[:8]
        assert digest(swapped, index) != original


def receivers_digest():
    """The same function as the server's plugin has it."""
    path = Path(__file__).resolve().parents[2] / "runtime" / "src" / "lockstep_vllm" / "digest.py"
    spec = importlib.util.spec_from_file_location("receivers_digest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest


def test_a_digest_does_not_depend_on_how_it_is_cut(monkeypatch):
    bytes_N = torch.randint(0, 256, (1003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = digest(bytes_N, 5)
    monkeypatch.setattr("lockstep.sync.digest._CHUNK_WORDS", 7)
    assert digest(bytes_N, 5) == whole


def test_the_probe():
    assert check_probe([-1.0, -2.0], [-1.0, -2.5], "m@3", largest=0.6) == 0.5
    bad = [([-1.0, -2.0], [-1.0, -2.1]), ([-1.0, float("nan")], [-1.0, -2.0]), ([-1.0], [-1.0, -2.0]), ([], [])]
    for served, trained in bad:
        with pytest.raises(MismatchError, match="m@3"):
            check_probe(served, trained, "m@3", largest=0.05)
    with pytest.raises(MismatchError, match="mean"):
        check_probe([0.0] * 4, [0.1] * 4, "m@3", largest=0.5, mean=0.05)
