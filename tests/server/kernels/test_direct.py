"""The direct path gives the same bytes as vLLM's `load_weights`, for its own model classes of every family."""

from __future__ import annotations

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from helpers import SERVER
from lockstep.models.tiny.write import write_tiny
from lockstep.testing.programs import probed
from lockstep_vllm.weight_sync.in_place_load import DirectUnavailableError, make_plan
from lockstep_wire.plan import Slot, TensorMeta, WireBucket

# A mixture first: vLLM makes its expert group for the first model of a process, if that has experts.
FAMILIES = ["qwen3_moe", "qwen3", "qwen3_5", "qwen3_5_moe"]
EVERY_LAYER = ["qwen3_moe", "qwen3_5_moe"]
"""Attention of both kinds, GatedDeltaNet, experts, and a dense MLP as the shared expert."""


@pytest.mark.server
@pytest.mark.parametrize("families", [EVERY_LAYER, pytest.param(FAMILIES, marks=pytest.mark.slow)])
def test_the_same_bytes_as_load_weights(runtime, tmp_path, families):
    folders = [str(write_tiny(f, tmp_path / f"{f}-{seed}", seed=seed)) for f in families for seed in (1, 2)]
    env = {
        "PYTHONPATH": str(runtime.plugin_path),
        "VLLM_PLUGINS": "lockstep",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    probe = SERVER / "direct_probe.py"
    results = probed(runtime, probe, *folders, env=env, log=tmp_path / "log", seconds=400.0)
    assert len(results) == len(families)
    for result in results:
        assert result["untouched"]
        assert result["matched_before"] == 0
        assert result["matched_after"]
        assert result["copies"] > result["copies_of_whole"] >= result["parameters"] > 20
        assert result["differing"] == []
        # Parameters that start the same under every seed stay; the matrices change.
        assert not [name for name in result["unchanged"] if "proj" in name or "experts" in name or "embed" in name]


def bucket_of(**shapes):
    """One bucket with these weights, fp32, one after another."""
    slots, offset = [], 0
    for name, shape in shapes.items():
        slots.append(Slot(TensorMeta(name, torch.float32, shape), tuple((0, size) for size in shape), offset))
        offset += 4 * math.prod(shape)
    bucket = WireBucket(0, 0, offset, tuple(slots))
    return bucket, {slot.name: slot.meta for slot in slots}, torch.arange(offset // 4).float().view(torch.uint8)


def test_neighbours_are_one_copy_and_odd_views_are_boxes():
    bucket, metas, bytes_N = bucket_of(gate=(2, 3), up=(2, 3), down=(3, 2), norm=(1, 4))
    fused, turned, norm = torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4)

    def load(weights):
        weight = dict(weights)
        fused[:2].copy_(weight["gate"])
        fused[2:].copy_(weight["up"])
        for column in range(2):
            turned[column].copy_(weight["down"].t()[column])
        norm.copy_(weight["norm"][0])

    plan = make_plan({"fused": fused, "turned": turned, "norm": norm}, metas, [bucket], load)
    assert not fused.any()
    assert len(plan) == 4
    plan.copy(0, bytes_N)
    assert fused.flatten().tolist() == list(range(12))
    assert turned.tolist() == [[12, 14, 16], [13, 15, 17]]
    assert norm.tolist() == [18, 19, 20, 21]
    assert plan.matches(0, bytes_N)
    turned[1, 2] += 1
    assert not plan.matches(0, bytes_N)


def test_a_buffer_that_is_given_up_is_freed():
    """In colocated mode the buffers of a sync, as large as the model, must be gone before the cache is back."""
    bucket, metas, bytes_N = bucket_of(left=(8,), right=(3, 5))
    left, right = torch.zeros(8), torch.zeros(5, 3)

    def load(weights):
        weight = dict(weights)
        left.copy_(weight["left"])
        right.copy_(weight["right"].t())

    plan = make_plan({"left": left, "right": right}, metas, [bucket], load)
    plan.copy(0, bytes_N)
    assert plan.matches(0, bytes_N)
    buffer = StorageWeakRef(bytes_N.untyped_storage())
    plan.forget_buffers()
    del bytes_N
    assert buffer.expired()
    again = torch.arange(23).float().flip(0).contiguous().view(torch.uint8)
    plan.copy(0, again)
    assert plan.matches(0, again)
    assert left.tolist() == list(range(22, 14, -1))


def test_what_cannot_be_repeated_is_refused():
    bucket, metas, bytes_N = bucket_of(left=(8,), right=(8,))
    weight = torch.zeros(2, 8)

    def planned(load, parameters=None):
        return make_plan(parameters or {"w": weight}, metas, [bucket], lambda weights: load(**dict(weights)))

    plan = planned(lambda left, right: (weight[0].copy_(left), weight[1].copy_(right)), {"w": weight, "alias": weight})
    plan.copy(0, bytes_N)
    assert weight.flatten().tolist() == list(range(16))
    padded = planned(lambda left, right: (weight[0].copy_(right), weight[1:].fill_(7)))
    padded.copy(0, bytes_N)
    assert weight.tolist() == [list(range(8, 16))] * 2  # a filled row stays as it is
    bad = {
        "computed": lambda left, right: weight.copy_(torch.stack([left, right]) + 1),
        "other memory": lambda left, right: (weight[0].copy_(left), weight[1].copy_(torch.ones(8))),
        "in place": lambda left, right: (weight[0].copy_(left), weight[1].copy_(right), weight.add_(1)),
        "filled and written": lambda left, right: (weight.zero_(), weight[0].copy_(left), weight[1].copy_(right)),
        "half": lambda left, right: weight[0].copy_(left),
        "twice": lambda left, right: (weight[0].copy_(left), weight[1].copy_(right), weight[0].copy_(right)),
        "read": lambda left, right: weight[0].copy_(left) if left.sum() > 0 else None,
        "steps": lambda left, right: (weight[:, ::2].copy_(left.view(2, 4)), weight[:, 1::2].copy_(right.view(2, 4))),
    }
    for load in bad.values():
        with pytest.raises(DirectUnavailableError, match=r"'w'|'left'"):
            planned(load)
    with pytest.raises(DirectUnavailableError, match="packed away"):
        planned(lambda left, right: None, {"gone": torch.empty(0)})
