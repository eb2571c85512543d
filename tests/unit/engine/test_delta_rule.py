"""The gated delta rule: chunks against the recurrence written out, and trees against each path on its own, with gradients, in fp64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import random_row

from lockstep.engine.layers.delta_rule import chunked, over_tree, rule_for

Tensors = tuple[torch.Tensor, ...]


def recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
):
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        seen = (state * k[:, t, :, :, None]).sum(2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - seen))[:, :, None]
        outputs.append((state * q[:, t, :, :, None]).sum(2) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


def inputs(length: int, heads: int, keys: int, values: int, batch: tuple[int, ...] = ()) -> Tensors:
    draw = lambda *shape: torch.randn(*batch, length, heads, *shape, dtype=torch.float64)  # noqa: E731
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    made = (unit(draw(keys)), unit(draw(keys)), draw(values), -draw().abs(), draw().sigmoid())
    return tuple(x.requires_grad_() for x in made)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 40), chunk=st.integers(1, 17))
def test_chunks_are_the_recurrence(seed: int, length: int, chunk: int) -> None:
    torch.manual_seed(seed)
    made = inputs(length, 2, 4, 6, (3,))
    state = torch.randn(3, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(3, length, 2, 6, dtype=torch.float64), torch.randn_like(state)
    results = []
    for function in (lambda *a: chunked(*a, chunk), recurrence):
        out, final = function(*made, state)
        gradients = torch.autograd.grad((out * slopes[0]).sum() + (final * slopes[1]).sum(), (*made, state))
        results.append((out, final, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), nodes=st.integers(1, 12), longest=st.integers(1, 9))
def test_tree_is_every_path_on_its_own(seed: int, nodes: int, longest: int) -> None:
    torch.manual_seed(seed)
    row = random_row(seed, nodes, longest)
    made = inputs(row.length, 2, 4, 6)
    slope = torch.randn(row.length, 2, 6, dtype=torch.float64)
    out = over_tree(made, row, rule_for(made[0]))  # pyright: ignore[reportArgumentType]
    gradients = torch.autograd.grad((out * slope).sum(), made)
    expected, loss = torch.zeros_like(out), torch.zeros((), dtype=torch.float64)
    for node in range(nodes):
        path, ancestor = [], node
        while ancestor >= 0:
            path = [*range(int(row.nodes.start_M[ancestor]), int(row.nodes.stop_M[ancestor])), *path]
            ancestor = int(row.nodes.parent_M[ancestor])
        own = slice(int(row.nodes.start_M[node]), int(row.nodes.stop_M[node]))
        out_of_path, _ = recurrence(*(x[path][None] for x in made), torch.zeros(1, 2, 4, 6, dtype=torch.float64))
        tail = out_of_path[0, -(own.stop - own.start) :]
        expected[own] = tail.detach()
        loss = loss + (tail * slope[own]).sum()
    torch.testing.assert_close(out.detach(), expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients, torch.autograd.grad(loss, made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
