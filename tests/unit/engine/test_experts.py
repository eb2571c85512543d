"""Routed experts: layout and grouped products against the plain loop, the router against softmax written out, replay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("groups")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 30), experts=st.integers(1, 9), topk=st.integers(1, 3))
def test_layout_gives_every_pair_its_own_aligned_row(seed: int, tokens: int, experts: int, topk: int) -> None:
    from lockstep.engine.layers.moe import ALIGN, layout

    generator = torch.Generator().manual_seed(seed)
    expert_P = torch.randint(0, experts, (tokens * topk,), generator=generator)
    token_P = torch.arange(tokens * topk) // topk
    slot_P, source_G, offsets_E = layout(token_P, expert_P, experts, tokens)
    assert len(set(slot_P.tolist())) == len(slot_P)
    assert torch.equal(source_G[slot_P], token_P)
    assert (source_G == tokens).sum() == len(source_G) - len(slot_P)
    starts = [0, *offsets_E.tolist()[:-1]]
    assert all(start % ALIGN == 0 for start in starts)
    assert offsets_E[-1] == len(source_G)
    for pair, expert in enumerate(expert_P.tolist()):
        assert starts[expert] <= slot_P[pair] < offsets_E[expert]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), experts=st.integers(1, 5), sizes=st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_grouped_product_is_the_loop(seed: int, experts: int, sizes: list[int]) -> None:
    from lockstep.engine.layers.moe import grouped, grouped_reference

    torch.manual_seed(seed)
    counts = torch.tensor(sizes[:experts]) * 8
    counts[-1] += 8
    offsets = counts.cumsum(0).to(torch.int32)
    results = []
    for function in (grouped, grouped_reference):
        torch.manual_seed(seed)
        x = torch.randn(int(counts.sum()), 16, requires_grad=True)
        w = torch.randn(experts, 24, 16, requires_grad=True)
        y = function(x, w, offsets)
        gradients = torch.autograd.grad((y * torch.randn_like(y)).sum(), (x, w))
        results.append((y, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_router_replays_choices_with_live_probabilities(normalise: bool) -> None:
    from types import SimpleNamespace

    from lockstep.engine.layers.router import Router

    torch.manual_seed(0)
    config = SimpleNamespace(
        num_moe_experts=6,
        hidden_size=8,
        moe_router_topk=2,
        moe_router_pre_softmax=not normalise,
        params_dtype=torch.float32,
    )
    router = Router(config)  # pyright: ignore[reportArgumentType]
    torch.nn.init.normal_(router.weight)
    x = torch.randn(5, 8)
    probabilities = (x @ router.weight.T).softmax(-1)
    weights, chosen, own = router(x, None)
    assert own is None
    expected, best = probabilities.topk(2)
    assert torch.equal(chosen, best)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True) if normalise else expected)
    alien = torch.tensor([[5, 0], [1, 2], [3, 4], [0, 1], [4, 2]])
    weights, chosen, own = router(x, alien)
    assert torch.equal(chosen, alien)
    assert torch.equal(own.sort().values, best.sort().values)
    expected = probabilities.gather(1, alien)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True) if normalise else expected)
    (weights * torch.randn_like(weights)).sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 0
    assert router.replay.replay_backward_list == [alien]  # does not grow from row to row
