"""Reading back what was copied: a digest per weight, through fused owners, scales, dtypes and odd views.

Shapes: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from lockstep_vllm.adapters.from_folder import stacked
from lockstep_vllm.weight_sync.identity import Identity, described
from lockstep_vllm.weight_sync.in_place_load import make_plan
from lockstep_wire.plan import Slot, TensorMeta, WireBucket


def planned(dtype: torch.dtype, live_dtype: torch.dtype, scaling: float = 1.0):
    """Weights of random shapes whose sizes don't end on words: (live parameters, identity, plan, buckets, a draw of their bytes)."""
    out, into = random.randrange(3, 40), random.randrange(3, 40)
    shapes = {
        "q.weight": (out, into),
        "k.weight": (random.randrange(1, 9), into),
        "down.weight": (into, out),
        "norm.weight": (out,),
        **{f"mlp.experts.{e}.gate_proj.weight": (5, into) for e in range(3)},
    }
    live = {
        "qk": torch.zeros(out + shapes["k.weight"][0], into, dtype=live_dtype),
        "down": torch.zeros(into, out, dtype=live_dtype).t(),
        "norm": torch.zeros(out, dtype=live_dtype),
        "w13": torch.zeros(3, 5, into, dtype=live_dtype),
    }

    def load(weights):
        given = dict(weights)
        live["qk"][:out].copy_(given["q.weight"])
        live["qk"][out:].copy_(given["k.weight"])
        live["down"].copy_(given["down.weight"].t())
        live["norm"].copy_(given["norm.weight"])
        for e in range(3):
            live["w13"][e].copy_(given[f"mlp.experts.{e}.gate_proj.weight"])

    buckets, metas = [], {name: TensorMeta(name, dtype, shape) for name, shape in shapes.items()}
    names = list(shapes)
    for index, some in enumerate((names[:3], names[3:])):
        slots, offset = [], 0
        for name in some:
            slots.append(Slot(metas[name], tuple((0, size) for size in shapes[name]), offset))
            offset += -(-math.prod(shapes[name]) * dtype.itemsize // 64) * 64
        buckets.append(WireBucket(0, index, offset, tuple(slots)))
    plan = make_plan(live, metas, buckets, load)
    scaled = {live["down"].untyped_storage().data_ptr()}
    identity = Identity(plan, torch.device("cpu"), scaled, scaling)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(b.nbytes // dtype.itemsize).to(dtype).view(torch.uint8) for b in buckets]

    def fill(buffers) -> None:
        for number, bytes_N in enumerate(buffers):
            plan.copy(number, bytes_N)
        live["down"].mul_(scaling)

    return live, identity, draw, fill


def sent(identity, buffers) -> list[str]:
    expected = identity.expect()
    for number, bytes_N in enumerate(buffers):
        expected.add(number, bytes_N)
    return expected.read()


OWNERS = {"qk": {"q.weight", "k.weight"}, "down": {"down.weight"}, "norm": {"norm.weight"}, "w13": {"mlp.experts"}}


@pytest.mark.parametrize("draw_number", range(5))
@pytest.mark.parametrize(
    ("dtype", "live_dtype"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16")]
)
def test_any_element_that_differs_is_named(dtype, live_dtype, draw_number):
    live, identity, draw, fill = planned(
        getattr(torch, dtype), getattr(torch, live_dtype), scaling=random.choice([1.0, 2.0, 0.3])
    )
    buffers = draw()
    digests = sent(identity, buffers)
    fill(buffers)
    for buffer in buffers:
        buffer.zero_()  # what was received is gone; the digests stay
    assert identity.differing(digests) == []
    for owner, names in OWNERS.items():
        flat = live[owner].as_strided((live[owner].numel(),), (1,))
        place = random.randrange(len(flat))
        old = flat[place].clone()
        bits = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
        bits[place] ^= 1  # the smallest change that there is
        (differing,) = identity.differing(digests)
        assert differing.name in names
        assert differing.owner == owner
        assert f"{differing.name!r} is not what was sent" in described("policy@3", 0, [differing])
        flat[place] = old
    # Two elements in each other's place.
    weight = live["w13"]
    weight[0, 0, 0], weight[2, 4, 1] = weight[2, 4, 1].clone(), weight[0, 0, 0].clone()
    assert {buffer.name for buffer in identity.differing(digests)} == {"mlp.experts"}


def test_another_order_is_told_from_other_elements():
    live, identity, draw, fill = planned(torch.float32, torch.bfloat16)
    buffers = draw()
    fill(buffers)
    mixed = torch.cat([live["w13"].flatten(), torch.zeros(7, dtype=torch.bfloat16)])
    mixed = mixed[torch.randperm(len(mixed))]
    assert identity.rearranged("w13", mixed, buffers)
    assert not identity.rearranged("norm", mixed, buffers)
    mixed.view(torch.int16)[int(mixed.nonzero()[0])] ^= 1
    assert not identity.rearranged("w13", mixed, buffers)


@pytest.mark.parametrize("together", [False, True])
def test_a_files_experts_are_stacked(together):
    """PEFT writes one pair for each expert, or a layer's in one: A [E R, I], experts outermost, and B [O, R E], experts innermost."""
    experts, rank, out, into = (random.randrange(2, 6) for _ in range(4))
    a_ERI, b_EOR = torch.randn(experts, rank, into), torch.randn(experts, out, rank)
    owner = "base_model.model.model.layers.0.mlp.experts"
    if together:
        name, file = (
            f"{owner}.gate_up_proj",
            {
                f"{owner}.base_layer.lora_A.weight": a_ERI.flatten(0, 1),
                f"{owner}.base_layer.lora_B.weight": b_EOR.permute(1, 2, 0).flatten(1),
            },
        )
    else:
        name, file = f"{owner}.up_proj", {}
        for e in random.sample(range(experts), experts):
            file |= {f"{owner}.{e}.up_proj.lora_A.weight": a_ERI[e], f"{owner}.{e}.up_proj.lora_B.weight": b_EOR[e]}
    tensors = stacked(file | {"other.lora_A.weight": a_ERI[0]}, rank)
    assert set(tensors) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight", "other.lora_A.weight"}
    assert torch.equal(tensors[f"{name}.lora_A.weight"], a_ERI)
    assert torch.equal(tensors[f"{name}.lora_B.weight"], b_EOR)
